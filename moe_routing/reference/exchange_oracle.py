"""``exchange`` by its definition, in one process that sees every rank's tokens; on the CPU.

Written from the contract alone. Which rows arrive has one right answer. Sums have a least and a
greatest one, as in ``permutation_oracle``; where ranks are summed in an order of nobody's choice,
each addition may be rounded to the rows' dtype.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from moe_routing.planning.kernel import DispatchPlan
from moe_routing.reference.permutation_oracle import Between, combine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class Arrival(NamedTuple):
    """A row of an expert's: slot k of token t of a source rank."""

    expert: int
    source: int
    token: int
    slot: int


def arrivals(ids: Sequence[Tensor], experts: Sequence[int]) -> list[Arrival]:
    """Return what a rank with these experts gets, in its order.

    By expert, then by source rank, token and slot.

    :param ids: ``[T, K]`` of each rank.

    >>> arrivals([torch.tensor([[2, 0]]), torch.tensor([[0, 9]])], experts=[0, 2])
    [Arrival(expert=0, source=0, token=0, slot=1), Arrival(expert=0, source=1, token=0, slot=0), \
Arrival(expert=2, source=0, token=0, slot=0)]
    """
    every = [
        Arrival(expert, source, token, slot)
        for source, of_rank in enumerate(ids)
        for token, row in enumerate(of_rank.tolist())
        for slot, expert in enumerate(row)
    ]
    return [one for expert in experts for one in every if one.expert == expert]


def exchange(
    results: Tensor, ids: Tensor, weights: Tensor, placement: Sequence[int], reduce: str
) -> Between:
    """Return between what the sums of one rank's tokens may lie: ``[T, H']`` each.

    :param results: ``[T, K, H']``, the experts' results of each slot; of slots without an expert
        anything.
    :param ids: ``[T, K]``; an id outside ``[0, E)`` has no expert.
    :param placement: the rank of each expert.
    :param reduce: ``"none"``: one float32 sum over the slots, in their order. ``"rank"``: that sum
        for each rank, rounded to the results' dtype; these are added in float32, by rank.

    >>> rows = torch.tensor([[[1.0], [2.0]]])
    >>> exchange(rows, torch.tensor([[1, 0]]), torch.ones(1, 2), [0, 0], "none").least.item()
    3.0
    """
    if reduce == "none":
        return _of_slots(results, weights, _ranks(ids, placement) >= 0)
    sums = _of_ranks(results, ids, weights, placement)
    least = torch.stack([partial.least for partial in sums], dim=1)
    greatest = torch.stack([partial.greatest for partial in sums], dim=1)
    every = torch.ones(least.shape[:2], dtype=torch.bool)
    return Between(_of_slots(least, None, every).least, _of_slots(greatest, None, every).greatest)


def summed_in_any_order(
    results: Tensor, ids: Tensor, weights: Tensor, placement: Sequence[int]
) -> Between:
    """Return the same where the ranks' sums are added in any order, and rounded each time.

    n sums need n - 1 additions. Each is off by at most half a unit in the last place of a partial
    sum, which is no larger than the sum of magnitudes.
    """
    sums = _of_ranks(results, ids, weights, placement)
    least = sum(partial.least.double() for partial in sums)
    greatest = sum(partial.greatest.double() for partial in sums)
    magnitude = sum(
        torch.maximum(partial.least.double().abs(), partial.greatest.double().abs())
        for partial in sums
    )
    unit = torch.finfo(results.dtype).eps / 2
    off = (len(sums) - 1) * unit * (1 + unit) ** len(sums) * torch.as_tensor(magnitude)
    off = off + torch.finfo(results.dtype).smallest_normal * len(sums)
    return Between(torch.as_tensor(least) - off, torch.as_tensor(greatest) + off)


def _of_ranks(
    results: Tensor, ids: Tensor, weights: Tensor, placement: Sequence[int]
) -> list[Between]:
    of = _ranks(ids, placement)
    return [_of_slots(results, weights, of == rank) for rank in range(max(placement) + 1)]


def _ranks(ids: Tensor, placement: Sequence[int]) -> Tensor:
    """Return the rank of each slot, -1 where it has no expert."""
    of = [
        placement[expert] if 0 <= expert < len(placement) else -1
        for expert in ids.flatten().tolist()
    ]
    return torch.tensor(of).view(ids.shape)


def _of_slots(results: Tensor, weights: Tensor | None, counted: Tensor) -> Between:
    """Sum the slots that count, ``[T, K]``, in their order."""
    pairs = torch.arange(counted.numel(), dtype=torch.int32).view(counted.shape)
    plan = DispatchPlan(
        order=pairs.flatten(),
        inverse=torch.where(counted, pairs, -1),
        counts=torch.tensor([counted.numel()], dtype=torch.int32),
        offsets=torch.tensor([0, counted.numel()], dtype=torch.int32),
    )
    return combine(results.flatten(0, 1), plan, weights)
