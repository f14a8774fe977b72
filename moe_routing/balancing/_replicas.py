"""Replicas of busy experts, and the ranks on which they are placed."""

from __future__ import annotations

import heapq
from typing import NamedTuple

import torch
from torch import Tensor

from moe_routing import _check as checks
from moe_routing.balancing import _check
from moe_routing_registry.text import refusal


class Placement(NamedTuple):
    """Where the replicas of experts are, for each layer, on the loads' device.

    What routers read is int32, which takes GPUs less time than int64.

    :ivar physical_to_logical: int64 ``[..., S]``, the expert in each slot. Rank r of ``num_ranks``
        has the slots from ``r * S / num_ranks`` on.
    :ivar logical_to_physical: int32 ``[..., E, R]``, the slots of each expert, ascending, then -1;
        R is the most replicas of an expert in any layer.
    :ivar replica_count: int32 ``[..., E]``, how many slots each expert has, 1 or more.
    """

    physical_to_logical: Tensor
    logical_to_physical: Tensor
    replica_count: Tensor


def place_replicas(loads: Tensor, *, num_slots: int, num_ranks: int) -> Placement:
    """Give busy experts more replicas, and ranks nearly equal loads.

    Greedy twice: each slot that is left after one for every expert goes to the expert with the
    highest load a replica; then replicas, the busiest first, go to the rank with the lowest load
    that has a free slot, and of equal ranks to one without that expert. Of equal experts the one
    with fewer replicas comes first, then the lower id, and of equal ranks the lower: the same loads
    give the same placement on every machine. It runs on the host and reads the loads there.

    Routers take what it returns by the same names, ``logical_to_physical=`` and ``replica_count=``.

    :param loads: ``[..., E]``, integers or floats, finite and not negative: tokens of each expert,
        of one call or of a history; leading dimensions are layers.
    :param num_slots: S, physical experts of all ranks together: a multiple of ``num_ranks``, E or
        more.
    :param num_ranks: ranks with equally many slots.
    :raises TypeError: an argument has the wrong type or dtype.
    :raises ValueError: an argument has the wrong value.

    >>> placement = place_replicas(torch.tensor([90, 10, 20]), num_slots=4, num_ranks=2)
    >>> placement.replica_count
    tensor([2, 1, 1], dtype=torch.int32)
    >>> placement.physical_to_logical
    tensor([0, 2, 0, 1])
    >>> placement.logical_to_physical
    tensor([[ 0,  2],
            [ 3, -1],
            [ 1, -1]], dtype=torch.int32)
    """
    _check.tensor("loads", loads, (*_check.INTEGERS, *_check.FLOATS))
    if loads.is_meta or checks.is_dtensor(loads):
        raise ValueError(refusal("loads", "a plain tensor that can be read", loads))
    num_slots, num_ranks = _sizes(loads.shape[-1], num_slots, num_ranks)
    experts, leading = loads.shape[-1], loads.shape[:-1]
    host = loads.detach().to("cpu", torch.float64).reshape(-1, experts)
    if not (host.isfinite() & (host >= 0)).all():
        raise ValueError(refusal("loads", "finite numbers of 0 or more", loads))
    placed = [_place(row, num_slots, num_ranks) for row in host.tolist()]
    most = max((len(slots) for layer in placed for slots in layer), default=1)
    logical = torch.full((len(placed), experts, most), -1, dtype=torch.int32)
    physical = torch.empty(len(placed), num_slots, dtype=torch.int64)
    for layer, slots_of in enumerate(placed):
        for expert, slots in enumerate(slots_of):
            logical[layer, expert, : len(slots)] = torch.tensor(slots, dtype=torch.int32)
            physical[layer, slots] = expert
    return Placement(
        physical.reshape(*leading, num_slots).to(loads.device),
        logical.reshape(*leading, experts, most).to(loads.device),
        (logical >= 0).sum(-1, dtype=torch.int32).reshape(*leading, experts).to(loads.device),
    )


def _sizes(experts: int, num_slots: object, num_ranks: object) -> tuple[int, int]:
    ranks = checks.integer("num_ranks", num_ranks)
    if ranks < 1:
        raise ValueError(refusal("num_ranks", "an int of 1 or more", ranks))
    slots = checks.integer("num_slots", num_slots)
    if slots < experts or slots % ranks:
        expected = f"a multiple of num_ranks = {ranks}, of E = {experts} or more"
        raise ValueError(refusal("num_slots", expected, slots))
    return slots, ranks


def _place(loads: list[float], slots: int, ranks: int) -> list[list[int]]:
    """Return the slots of each expert."""
    counts = _replicas(loads, slots)
    busiest = sorted(
        (expert for expert, count in enumerate(counts) for _ in range(count)),
        key=lambda expert: (-loads[expert] / counts[expert], expert),
    )
    load_of, on_rank = [0.0] * ranks, [list[int]() for _ in range(ranks)]
    for expert in busiest:
        free = (rank for rank in range(ranks) if len(on_rank[rank]) < slots // ranks)
        rank = min(free, key=lambda rank: (load_of[rank], expert in on_rank[rank], rank))
        load_of[rank] += loads[expert] / counts[expert]
        on_rank[rank].append(expert)
    slots_of = [list[int]() for _ in loads]
    for slot, expert in enumerate(expert for experts in on_rank for expert in experts):
        slots_of[expert].append(slot)
    return slots_of


def _replicas(loads: list[float], slots: int) -> list[int]:
    """Return how many replicas each expert gets."""
    counts = [1] * len(loads)
    queue = [(-load, 1, expert) for expert, load in enumerate(loads)]
    heapq.heapify(queue)
    for _ in range(slots - len(loads)):
        _, count, expert = heapq.heappop(queue)
        counts[expert] = count + 1
        heapq.heappush(queue, (-loads[expert] / counts[expert], counts[expert], expert))
    return counts
