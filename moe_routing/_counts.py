"""``counts=``: how many slots each expert got, added to a tensor of the caller's.

No kernel counts. A call routes without its ``expert_map``, counts the logical ids, and renames them
then; so every backend counts alike. A backend that counts in its own launch would name ``counts``
among its ``BackendSpec.operands``, as one that takes recorded ids names ``ids``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.compiler import is_dynamo_compiling

from moe_routing import _check
from moe_routing._autograd import apply_map
from moe_routing._overlap import overlaps
from moe_routing.private_api import is_functorch_wrapped_tensor
from moe_routing_registry.text import refusal

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from moe_routing.kernel import Operands
    from moe_routing.planning.kernel import DispatchPlan


def check_call(
    counts: object, operands: Operands, shared: int, planned: DispatchPlan | None = None
) -> None:
    """Check ``counts`` of a router's call, and ``expert_map``, which its kernel does not see then.

    :param planned: the plan that the call is to fill.
    """
    out = operands.out
    if out is not None:
        out = _check.as_output(out)
        operands = operands._replace(out=out)
    _check.check_dense(operands)
    if operands.expert_map is not None and not is_dynamo_compiling():
        _check.check_addresses(operands)
    named = operands._replace(out=None).named
    for written in (out, planned):
        parts = {} if written is None else written._asdict()
        named |= {f"the {name} of out": part for name, part in parts.items()}
    check(counts, operands.logits, -1, shared, named)


def check(
    counts: object, like: object, dim: int, shared: int, others: Mapping[str, object]
) -> None:
    """Require a tensor that can count, and a map of as many experts.

    What is wrong with other arguments is left to the call itself, which checks all but the map.

    :param like: the tensor whose size in dimension ``dim`` is E: logits, or a router's weight.
    :param shared: how many shared experts there are.
    :param others: everything else that the call reads and writes, by name.
    :raises TypeError: ``counts`` or ``expert_map`` has the wrong type or dtype.
    :raises ValueError: it has the wrong shape, device or memory.
    """
    if not isinstance(like, Tensor) or not _check.is_dense(like) or not like.dim():
        return
    experts = like.shape[dim]
    tensors = {name: value for name, value in others.items() if isinstance(value, Tensor)}
    counts = _checked(counts, sorted({experts, experts + shared}), like.device)
    if others["expert_map"] is not None:
        _check.check_vector(
            "expert_map", others["expert_map"], experts + shared, like, integer=True
        )
    if any(map(_check.is_dtensor, (counts, *tensors.values()))):
        expected = "None with DTensors; count the rows of each rank by themselves"
        raise TypeError(refusal("counts", expected, counts))
    if not is_dynamo_compiling():  # where there is no memory to look at
        _check_memory(counts, tensors)


def _checked(counts: object, lengths: list[int], device: torch.device) -> Tensor:
    shapes = " or ".join(f"[{length}]" for length in lengths)
    if not isinstance(counts, Tensor) or counts.dtype not in _check.IDS_DTYPES:
        raise TypeError(refusal("counts", f"an int32 or int64 tensor {shapes}", counts))
    if not _check.is_dense(counts) or counts.dim() != 1 or counts.shape[0] not in lengths:
        raise ValueError(refusal("counts", f"a dense tensor {shapes}", counts))
    if counts.device != device:
        raise ValueError(refusal("counts", f"a tensor on {device}, as the logits", counts))
    if counts.stride(0) == 0 and counts.shape[0] > 1:
        raise ValueError(refusal("counts", "an element of its own for each expert", counts))
    return counts


def _check_memory(counts: Tensor, tensors: Mapping[str, Tensor]) -> None:
    if any(map(is_functorch_wrapped_tensor, (counts, *tensors.values()))):
        raise TypeError(refusal("counts", "None inside a transform of torch.func", counts))
    _check.check_writable("counts", counts)
    shares = next((name for name, one in tensors.items() if overlaps(counts, one)), None)
    if shares is not None:
        expected = "a tensor that shares no memory with another"
        raise ValueError(refusal("counts", expected, f"one that overlaps {shares}"))


def add(counts: Tensor, ids: Tensor, num_experts: int, shared: int) -> None:
    """Add to each expert's count the slots that it has in logical ``ids [..., C]``.

    :param shared: how many columns are of shared experts, which have counts of their own or none.
    """
    if shared and counts.shape[0] == num_experts:
        ids = ids[..., :-shared]
    slots = ids.flatten()
    # Where there is no expert, nothing is added to the first one. Integers have one sum, in
    # whatever order threads add.
    counts.index_add_(0, slots.clamp(min=0), (slots >= 0).to(counts.dtype))


def renamed(ids: Tensor, expert_map: Tensor | None, out: Tensor | None) -> Tensor:
    """Return the physical ids of logical ones, in ``out`` if the logical ones are there."""
    if expert_map is None:
        return ids
    physical = apply_map(ids, expert_map)
    return physical if out is None else out.copy_(physical)
