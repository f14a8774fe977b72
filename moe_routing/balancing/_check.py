"""Arguments of losses and updates, checked before anything is computed."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from moe_routing import _check
from moe_routing.balancing.problem import SCORES
from moe_routing_registry.text import refusal

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)
BIASES = (torch.float32, torch.float64)
"""Of a bias that is updated: a step of 0.001 is lost next to 1 in a shorter dtype."""
_SEQUENCES = 3


def _named(dtypes: tuple[torch.dtype, ...]) -> str:
    return f"a tensor of dtype {' or '.join(map(str, dtypes))}"


def tensor(name: str, value: object, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """Return a dense tensor ``[..., n]`` of one of the dtypes."""
    if not isinstance(value, Tensor) or value.dtype not in dtypes:
        raise TypeError(refusal(name, _named(dtypes), value))
    if not _check.is_dense(value) or not value.dim() or not value.shape[-1]:
        expected = "a dense tensor of rank 1 or more, with 1 column or more"
        raise ValueError(refusal(name, expected, value) + _check.layout(value))
    return value


def logits(value: object) -> Tensor:
    """Require logits ``[..., E]``."""
    return tensor("logits", value, FLOATS)


def like(name: str, value: Tensor, expected: tuple[int, ...], other: Tensor) -> None:
    """Require a shape, the device of another tensor, and a DTensor if and only if that is one."""
    if tuple(value.shape) != expected:
        raise ValueError(refusal(name, f"the shape {list(expected)}", value))
    if value.device != other.device:
        raise ValueError(refusal(name, f"a tensor on {other.device}", value))
    if _check.is_dtensor(value) != _check.is_dtensor(other):
        kind = "a DTensor" if _check.is_dtensor(other) else "a plain tensor"
        raise TypeError(refusal(name, f"{kind}, as the other tensors", value))


def writable(name: str, value: Tensor) -> None:
    """Require a tensor that may be updated in place here."""
    if torch.compiler.is_compiling():  # which traces neither question
        return
    if value.is_inference() and not torch.is_inference_mode_enabled():
        expected = "a tensor that can be written outside torch.inference_mode()"
        raise ValueError(refusal(name, expected, "an inference tensor"))
    least = 1  # the least stride that steps over all that is inside
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size > 1 and stride < least:
            expected = "a tensor whose elements share no memory"
            raise ValueError(refusal(name, expected, value) + f", strides {list(value.stride())}")
        least = max(least, stride * size)


def group(value: object, of: Tensor) -> None:
    """Require a process group that this rank is in, or ``None``; ``None`` for DTensors."""
    if value is None:
        return
    distributed = torch.distributed
    if distributed.is_available() and value is distributed.GroupMember.NON_GROUP_MEMBER:
        msg = "group: expected a group that this rank is in, got one that it is not in"
        raise ValueError(msg)
    if not (distributed.is_available() and isinstance(value, distributed.ProcessGroup)):
        raise TypeError(refusal("group", "a torch.distributed.ProcessGroup, or None", value))
    if _check.is_dtensor(of):
        expected = "None for DTensors, whose counts are of all ranks"
        raise ValueError(refusal("group", expected, value))


def valid(mask: object, of: Tensor) -> None:
    """Require a mask ``[...]`` of the tokens of logits ``[..., E]``, or ``None``."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
        raise TypeError(refusal("valid", "a tensor of dtype torch.bool, or None", mask))
    if not _check.is_dense(mask):
        raise ValueError(refusal("valid", "a dense tensor", mask) + _check.layout(mask))
    like("valid", mask, tuple(of.shape[:-1]), of)


def call(of: object, ids: object, score: object, mask: object, *, sequences: bool = False) -> None:
    """Check the arguments of a load balancing loss."""
    given = logits(of)
    if sequences and given.dim() != _SEQUENCES:
        raise ValueError(refusal("logits", "a tensor [B, S, E]", of))
    picked = tensor("ids", ids, INTEGERS)
    like("ids", picked, (*given.shape[:-1], picked.shape[-1]), given)
    if not isinstance(score, str) or score not in SCORES:
        error = ValueError if isinstance(score, str) else TypeError
        raise error(refusal("score", f"one of {', '.join(map(repr, SCORES))}", score))
    valid(mask, given)


def rate(value: object, dtype: torch.dtype) -> float:
    """Require a number of 0 or more that is finite in a dtype."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(refusal("rate", "a number", value))
    number: Any = value  # mypy does not know that reals are ordered
    most = torch.finfo(dtype).max
    if not 0 <= number <= most:
        raise ValueError(refusal("rate", f"a finite number of 0 or more, at most {most}", value))
    return float(number)
