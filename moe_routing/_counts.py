"""``counts=``: how many slots each expert got, added to a tensor of the caller's.

A backend that counts itself names ``counts`` among its ``BackendSpec.operands``. For the others the
router counts, from the logical ids.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.compiler import is_dynamo_compiling

from moe_routing import _check
from moe_routing._overlap import overlaps
from moe_routing.private_api import is_functorch_wrapped_tensor
from moe_routing_registry.text import refusal

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor


def check(
    counts: object, experts: int, shared: int, device: torch.device, others: Mapping[str, Tensor]
) -> None:
    """Require a tensor that can count.

    :param shared: how many shared experts there are.
    :param others: everything else that the call reads and writes, by name.
    :raises TypeError: ``counts`` has the wrong type or dtype.
    :raises ValueError: it has the wrong shape, device or memory.
    """
    lengths = sorted({experts, experts + shared})
    counts = _check.check_integers(
        "counts", counts, " or ".join(f"[{length}]" for length in lengths), device,
        lambda shape: len(shape) == 1 and shape[0] in lengths,
    )  # fmt: skip
    if counts.stride(0) == 0 and counts.shape[0] > 1:
        raise ValueError(refusal("counts", "an element of its own for each expert", counts))
    if any(map(_check.is_dtensor, (counts, *others.values()))):
        expected = "None with DTensors; count the rows of each rank by themselves"
        raise TypeError(refusal("counts", expected, counts))
    if not is_dynamo_compiling():  # where there is no memory to look at
        _check_memory(counts, others)


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
