"""Arguments of losses and updates, checked before anything is computed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe_routing import _check
from moe_routing.balancing._sums import SCORES
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
        raise ValueError(refusal(name, expected, value))
    return value


def logits(value: object) -> Tensor:
    """Require logits ``[..., E]``."""
    return tensor("logits", value, FLOATS)


def like(name: str, value: Tensor, expected: tuple[int, ...], other: Tensor) -> None:
    """Require a shape, and the device of another tensor."""
    if tuple(value.shape) != expected:
        raise ValueError(refusal(name, f"the shape {list(expected)}", value))
    if value.device != other.device:
        raise ValueError(refusal(name, f"a tensor on {other.device}", value))


def valid(mask: object, of: Tensor) -> None:
    """Require a mask ``[...]`` of the tokens of logits ``[..., E]``, or ``None``."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
        raise TypeError(refusal("valid", "a tensor of dtype torch.bool, or None", mask))
    if not _check.is_dense(mask):
        raise ValueError(refusal("valid", "a dense tensor", mask))
    like("valid", mask, tuple(of.shape[:-1]), of)


def call(of: object, ids: object, score: object, mask: object, *, sequences: bool = False) -> None:
    """Check the arguments of a load balancing loss."""
    given = logits(of)
    if sequences and given.dim() != _SEQUENCES:
        raise ValueError(refusal("logits", "a tensor [B, S, E]", of))
    picked = tensor("ids", ids, INTEGERS)
    like("ids", picked, (*given.shape[:-1], picked.shape[-1]), given)
    if score not in SCORES:
        error = ValueError if isinstance(score, str) else TypeError
        raise error(refusal("score", f"one of {', '.join(map(repr, SCORES))}", score))
    valid(mask, given)


def rate(value: object) -> float:
    """Require a finite number that is not negative."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(refusal("rate", "a number", value))
    if not 0 <= value < math.inf:
        raise ValueError(refusal("rate", "a finite number of 0 or more", value))
    return float(value)
