"""``logical_to_physical=`` and ``replica_count=``: which replica of its expert a slot gets.

Row t gets replica ``t % count`` of each of its experts. So a row's ids depend on the row's number
and on nothing else: neither on a rank, nor on other rows, nor on an order of threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from moe_routing import _check
from moe_routing_registry.text import refusal

if TYPE_CHECKING:
    from collections.abc import Mapping

_MATRIX = 2
_MOST_ELEMENTS = 2**31 - 1
"""Of a table: kernels have indices of 32 bits."""


class Replicas(NamedTuple):
    """The physical ids of each logical expert, as a call brings them.

    :ivar logical_to_physical: ``[E + shared_experts, R]``.
    :ivar replica_count: ``[E + shared_experts]``, how many of a row's entries are used.
    """

    logical_to_physical: Tensor
    replica_count: Tensor


def given(
    logical_to_physical: Tensor | None, replica_count: Tensor | None, expert_map: object
) -> Replicas | None:
    """Return the replicas that a call brings, ``None`` for a call without.

    :raises TypeError: there is one of the two operands without the other.
    :raises ValueError: there is an ``expert_map`` too.
    """
    if logical_to_physical is None and replica_count is None:
        return None
    if logical_to_physical is None:
        expected = "an int32 or int64 tensor [E, R] with replica_count"
        raise TypeError(refusal("logical_to_physical", expected, None))
    if replica_count is None:
        expected = "an int32 or int64 tensor [E] with logical_to_physical"
        raise TypeError(refusal("replica_count", expected, None))
    if expert_map is not None:
        expected = "None with expert_map: one renames the ids"
        raise ValueError(refusal("logical_to_physical", expected, logical_to_physical))
    return Replicas(logical_to_physical, replica_count)


def check(
    replicas: Replicas,
    length: int,
    device: torch.device,
    read: Mapping[str, Tensor],
    written: Mapping[str, Tensor],
) -> None:
    """Require a table and a count of so many experts, of which no output shares the memory.

    :param read: the other operands of the call, by name.
    :param written: the call's outputs, by name.
    :raises TypeError: one has the wrong type or dtype, or there are DTensors.
    :raises ValueError: one has the wrong shape or device, or shares memory with an output.
    """
    table, count = replicas
    _check.check_integers(
        "logical_to_physical", table, f"[{length}, R] of R >= 1 and {length} * R < 2**31", device,
        lambda shape: len(shape) == _MATRIX
        and shape[0] == length
        and 1 <= shape[1] <= _MOST_ELEMENTS // length,
    )  # fmt: skip
    _check.check_integers(
        "replica_count", count, f"[{length}]", device,
        lambda shape: len(shape) == 1 and shape[0] == length,
    )  # fmt: skip
    if any(map(_check.is_dtensor, (*replicas, *read.values(), *written.values()))):
        expected = "None with DTensors; route the rows of each rank by themselves"
        raise TypeError(refusal("logical_to_physical", expected, table))
    if not is_dynamo_compiling():  # where there are no addresses
        _check.check_apart(written, replicas._asdict())


def chosen(ids: Tensor, replicas: Replicas) -> Tensor:
    """Return the physical ids of logical ``ids [..., C]``; where there is no expert, -1 stays."""
    table, count = replicas
    rows = ids.flatten(0, -2) if ids.dim() > 1 else ids[None]
    experts = rows.clamp(min=0).long()
    # The host cannot see a count without waiting for the device. A clamped one reads nothing
    # outside the table.
    counts = count.clamp(1, table.shape[1])[experts]
    row = torch.arange(rows.shape[0], device=ids.device)[:, None]
    physical = table[experts, row % counts].to(ids.dtype)
    return torch.where(rows < 0, rows, physical).view(ids.shape)
