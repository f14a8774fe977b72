"""The kernel that counts the slots of many tokens, and renames the ids of calls that do both.

Programs of ``route`` have few rows each, so most experts occur in every one, and each adds to the
same few cache lines: half a million slots on 128 counts keep those lines busy for far longer than
routing takes. Here few programs read the ids again, each a large part of them, most of it from the
L2 cache. A program adds up its slots in shared memory, and adds to each count once. That is a
second kernel, which costs more than the additions of few slots do.

Tile: ``BLOCK`` slots, of a number of programs that does not grow with T.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import triton
import triton.language as tl

from moe_routing_backends.triton.device.epilogue import physical_ids
from moe_routing_backends.triton.device.pdl import grid_dependency_wait
from moe_routing_backends.triton.planning.kernels import HISTOGRAM_MASKS, bins

if TYPE_CHECKING:
    from moe_routing_registry import RoutingProblem

SLOTS_APART = 16_384
"""Slots of a call above which this kernel counts, and not the one that routes."""
WARP_SIZE = 32
"""Where there is a choice: Triton-XPU 3.3 compiles no histogram for fewer lanes."""
MOST_PROGRAMS = 256


class CountLaunch(NamedTuple):
    """How up to so many slots are counted.

    :ivar slots: most of them.
    :ivar block: slots of a program at a time.
    """

    slots: float
    block: int
    num_warps: int


LAUNCHES = (CountLaunch(65_536, 1024, 8), CountLaunch(math.inf, 2048, 16))
"""By rising number of slots. Measured on an H100, in steps of four times as many slots."""
NOT_SPECIALIZED = ("ids", "expert_map", "replica_count", "counts", "most_replicas", "T")
MASKS = tl.constexpr(HISTOGRAM_MASKS)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def moe_routing_counts(
    ids, expert_map, replica_count, counts, most_replicas, T: tl.int32, SPEC: tl.constexpr,
    WIDTH: tl.constexpr, PDL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count the logical ``ids [T, K + SHARED]``, and write physical ones if there is a map.

    ``expert_map``: with a ``replica_count``, the table of replicas, ``most_replicas`` a row.
    ``WIDTH``: elements of ``counts`` as a power of two.
    """
    COLUMNS: tl.constexpr = SPEC.value.topk + SPEC.value.shared_experts
    COUNTED: tl.constexpr = SPEC.value.counted_columns
    EXPERTS: tl.constexpr = SPEC.value.num_experts + SPEC.value.shared_experts
    # No early launch of the next kernel: its waiting programs would delay programs of this one.
    grid_dependency_wait(PDL)
    slots = T.to(tl.int64) * COLUMNS
    found = tl.zeros([WIDTH], tl.int32)
    for first in range(tl.program_id(0).to(tl.int64) * BLOCK, slots, tl.num_programs(0) * BLOCK):
        slot = first + tl.arange(0, BLOCK)
        expert = tl.load(ids + slot, mask=slot < slots, other=-1).to(tl.int32)
        has_expert = expert >= 0
        counted = has_expert
        if COUNTED < COLUMNS:
            counted = has_expert & (slot % COLUMNS < COUNTED)
        if MASKS:
            found += tl.histogram(expert, WIDTH, mask=counted)
        else:
            found += tl.histogram(tl.where(counted, expert, EXPERTS), WIDTH)
        if expert_map is not None:
            row = (slot // COLUMNS).to(tl.int32)
            physical = physical_ids(
                expert, row, has_expert, expert_map, replica_count, most_replicas
            )
            tl.store(ids + slot, physical.to(ids.dtype.element_ty), mask=has_expert)
    expert = tl.arange(0, WIDTH)
    # Only experts below the length of the counts were found, but for the bin without a mask.
    there = (found != 0) & (expert < EXPERTS)
    tl.atomic_add(counts + expert, found.to(counts.dtype.element_ty), mask=there, sem="relaxed")


def launch_for(slots: int) -> CountLaunch:
    """Return how so many slots are counted."""
    return next(launch for launch in LAUNCHES if slots <= launch.slots)


def constants(problem: RoutingProblem, launch: CountLaunch) -> dict[str, Any]:
    """Return the constants that do not depend on a call's operands."""
    experts = problem.num_experts + problem.spec.shared_experts
    return {"WIDTH": bins(experts), "BLOCK": launch.block}


def programs(slots: int, launch: CountLaunch) -> int:
    """Return how many programs count so many slots."""
    return min(MOST_PROGRAMS, -(-slots // launch.block))
