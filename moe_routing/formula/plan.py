"""The dispatch plan in PyTorch operations, which read nothing on the host and trace whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moe_routing.planning.kernel import DispatchPlan

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.planning.problem import PlanProblem

_MOST_IN_BYTES = 255
"""E up to which the keys, 0 to E, fit in bytes: a CPU sorts those in half the time of 16 bits."""


def plan(
    problem: PlanProblem, ids: Tensor, capacity: int | None = None, weights: Tensor | None = None
) -> DispatchPlan:
    """Group the pairs of ids ``[T, K]`` by expert; see ``PlanKernel``.

    >>> from moe_routing.planning.problem import PlanProblem
    >>> ids = torch.tensor([[1, 0], [1, 2], [-1, 1]])
    >>> made = plan(PlanProblem(num_experts=3, topk=2), ids)
    >>> made.order.tolist(), made.offsets.tolist()
    ([1, 0, 2, 5, 3, 4], [0, 1, 4, 5])
    """
    num_experts, shape = problem.num_experts, ids.shape
    ids = ids.reshape(-1)
    keys = _keys(ids, num_experts)
    num_dropped = None
    if problem.drop != "nothing":
        assert capacity is not None  # noqa: S101 -- for mypy: a problem that drops has one
        keys, num_dropped = _without_dropped(
            keys, num_experts, capacity, weights if problem.drop == "least_weight" else None
        )
    order, sorted_keys, starts = _by_expert(keys, num_experts)
    counts = starts.diff()
    if problem.layout == "sorted":
        inverse = _scattered(order, torch.arange(len(order), device=ids.device))
        return DispatchPlan(
            order.int(), inverse.int().view(shape), counts.int(), starts.int(), None, num_dropped
        )
    if problem.layout == "masked":
        assert capacity is not None  # noqa: S101 -- for mypy, likewise
        offsets = torch.arange(num_experts + 1, device=ids.device) * capacity
        length = num_experts * capacity
    else:
        blocks = (counts + (problem.block - 1)) // problem.block
        ends = blocks.cumsum(0) * problem.block
        offsets = torch.nn.functional.pad(ends, (1, 0))
        length = places(len(order), num_experts, problem.block)
    expert = sorted_keys.long()
    place = offsets[expert] - starts[expert] + torch.arange(len(order), device=ids.device)
    outside = expert == num_experts
    # One element more, for the pairs without a place to be written to.
    padded = torch.full((length + 1,), len(order), dtype=torch.int64, device=ids.device)
    padded = padded.scatter(0, torch.where(outside, length, place), order)[:length]
    inverse = _scattered(order, torch.where(outside, -1, place)).int().view(shape)
    block_experts = None
    if problem.layout == "masked":
        padded = padded.view(num_experts, -1)
    else:
        first = torch.arange(0, length, problem.block, device=ids.device)
        found = torch.searchsorted(ends, first, right=True)
        block_experts = torch.where(found == num_experts, -1, found).int()
    return DispatchPlan(
        padded.int(), inverse, counts.int(), offsets.int(), block_experts, num_dropped
    )


def places(pairs: int, num_experts: int, block: int) -> int:
    """Return how many places any ids of so many pairs can need.

    An expert's first place is a multiple of ``block``.

    Each expert that has a pair, at most as many as there are pairs, leaves at most ``block - 1``
    places empty.
    """
    # Of a SymInt, `min` would make a guard of which is less. Dynamo traces `min` without one, and
    # before torch 2.13 it traces no `sym_min` of two constants.
    least = min if isinstance(pairs, int) else torch.sym_min
    fewer: int = least(pairs, num_experts)
    return pairs + fewer * (block - 1)


def without_least_weight(
    problem: PlanProblem, ids: Tensor, capacity: int, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the ids, with E for the pairs of least weight beyond a capacity, and their number.

    What remains fits the capacity.
    """
    keys = _keys(ids.reshape(-1), problem.num_experts)
    kept, num_dropped = _without_dropped(keys, problem.num_experts, capacity, weights)
    return kept.to(ids.dtype).view(ids.shape), num_dropped


def _keys(ids: Tensor, num_experts: int) -> Tensor:
    """Return the expert of each pair, E for none, as narrow as a sort is fastest."""
    narrow = torch.uint8 if num_experts <= _MOST_IN_BYTES else torch.int16
    return torch.where((ids >= 0) & (ids < num_experts), ids, num_experts).to(narrow)


def _by_expert(keys: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pairs by ascending key, their keys, and where each of the keys 0 to E begins."""
    sorted_keys, order = torch.sort(keys, stable=True)
    every = torch.arange(num_experts + 1, device=keys.device, dtype=keys.dtype)
    return order, sorted_keys, torch.searchsorted(sorted_keys, every)


def _scattered(order: Tensor, values: Tensor) -> Tensor:
    return torch.empty_like(order).scatter(0, order, values)


def _without_dropped(
    keys: Tensor, num_experts: int, capacity: int, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the keys, with no expert for the pairs beyond its capacity, and how many those are.

    :param weights: if given, an expert's pairs count by descending weight, equal ones by token and
        slot, and NaN last.
    """
    first = None
    if weights is not None:
        descending = torch.where(weights.isnan(), -torch.inf, weights).reshape(-1)
        first = torch.sort(descending, descending=True, stable=True).indices
    order, sorted_keys, starts = _by_expert(keys if first is None else keys[first], num_experts)
    rank = torch.arange(len(order), device=keys.device) - starts[sorted_keys.long()]
    kept = torch.where(rank < capacity, sorted_keys, num_experts)
    made = torch.empty_like(keys).scatter(0, order if first is None else first[order], kept)
    return made, (keys != made).sum(dtype=torch.int32).reshape(1)
