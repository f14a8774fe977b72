"""The kernels of ``plan``: counting pairs by expert, and giving each pair its place.

Pairs are counted and placed in blocks of consecutive pairs, one a program. A pair's place is the
first place of its expert, plus the expert's pairs in the blocks before, plus those before it in its
own block. No sum depends on the order in which programs run, so a plan has the same bits for every
launch.

With few pairs every program counts all of them by itself (``moe_routing_plan``): that is faster
than a second launch. With more, a first launch counts each block (``moe_routing_plan_count``), and
each program of the last adds up the counts that it needs (``moe_routing_plan_place``). With many
that sum is a launch of its own (``moe_routing_plan_scan``).

The kernel that makes the ids can do a part: plan a single row (``plan_row``), or count each block
(``count_pairs``), so that one launch places the pairs (``moe_routing_plan_place_counted``).
"""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from moe_routing_backends.triton.device.pdl import grid_dependency_wait, launch_dependents
from moe_routing_backends.triton.kernels.spec import next_power_of_two

if TYPE_CHECKING:
    from moe_routing.planning import PlanProblem


HISTOGRAM_MASKS = "mask" in signature(tl.histogram).parameters
"""Triton 3.3's, and so Triton-XPU's, takes none."""
WIDEST_LOOK_UP = 256
"""Elements that a program looks up at once: there, in vectors of at least as many."""
NARROWEST = 16
"""Shortest vector over experts."""
WIDEST_CHUNK = 64
NOT_SPECIALIZED = (
    "ids", "partial", "within", "order", "inverse", "counts", "offsets", "block_experts",
    "num_dropped", "pairs", "length", "blocks", "groups", "capacity", "row_stride", "slot_stride",
)  # fmt: skip
"""Arguments whose value or alignment must not select another compiled kernel: all of them."""


@dataclass(frozen=True)
class PlanSpec:
    """What a kernel is compiled for: one compile-time constant, like ``KernelSpec``.

    :ivar width: the length of vectors over experts: a power of two, at least ``NARROWEST`` and E.
    :ivar block: 0 except in the layout in blocks.
    :ivar chunk: places of a block that are filled at a time.
    :ivar leaves_empty: the layout has places without a pair.
    :ivar counts_to: the place of a pair is worked out from how many of its expert are before it.
    :ivar masks: this Triton's histogram takes a mask; else ``width`` is above E, and bin E counts
        pairs without an expert.
    :ivar drops: what is beyond an expert's capacity has no place.
    """

    num_experts: int
    width: int
    topk: int
    block: int
    chunk: int
    masked: bool
    drops: bool
    leaves_empty: bool
    counts_to: bool
    masks: bool

    @property
    def value(self) -> PlanSpec:
        """Return itself: the interpreter passes constants as they are, not as ``tl.constexpr``."""
        return self


def bins(experts: int) -> int:
    """Return the length of a histogram of experts.

    Where it takes no mask, one bin more is for what is not counted.
    """
    if HISTOGRAM_MASKS:
        return max(NARROWEST, next_power_of_two(experts))
    return max(WIDEST_LOOK_UP, next_power_of_two(experts + 1))


def plan_spec(problem: PlanProblem) -> PlanSpec:
    """Return the constant for a problem."""
    drops = problem.drop == "last"
    return PlanSpec(
        num_experts=problem.num_experts,
        width=bins(problem.num_experts),
        topk=problem.topk,
        block=problem.block if problem.layout == "blocks" else 0,
        chunk=min(WIDEST_CHUNK, next_power_of_two(problem.block)),
        masked=problem.layout == "masked",
        drops=drops,
        leaves_empty=problem.layout != "sorted",
        counts_to=drops or problem.layout == "blocks",
        masks=HISTOGRAM_MASKS,
    )


@triton.jit
def expert_of_pair(
    ids, pair, inside, row_stride, slot_stride, SPEC: tl.constexpr, FLAT: tl.constexpr
):
    """Load the expert of each pair: E for an id outside [0, E), and where ``inside`` is false."""
    E: tl.constexpr = SPEC.value.num_experts
    K: tl.constexpr = SPEC.value.topk
    if FLAT:
        at = pair.to(tl.int64)
    else:
        # Neither product need fit int32: strides may be as large as it allows.
        at = (pair // K).to(tl.int64) * row_stride + (pair % K).to(tl.int64) * slot_stride
    loaded = tl.load(ids + at, mask=inside, other=-1)
    return tl.where((loaded >= 0) & (loaded < E), loaded, E).to(tl.int32)


@triton.jit
def counted(expert, SPEC: tl.constexpr):
    """Count the pairs of each expert: ``[width]``."""
    E: tl.constexpr = SPEC.value.num_experts
    WIDTH: tl.constexpr = SPEC.value.width
    if SPEC.value.masks:
        return tl.histogram(expert, WIDTH, mask=expert < E)
    else:
        return tl.where(tl.arange(0, WIDTH) < E, tl.histogram(expert, WIDTH), 0)


@triton.jit
def laid_out(count, capacity, SPEC: tl.constexpr):
    """Return for each expert the pairs that have a place, its first place, and its end."""
    E: tl.constexpr = SPEC.value.num_experts
    WIDTH: tl.constexpr = SPEC.value.width
    BLOCK: tl.constexpr = SPEC.value.block
    kept = count
    if SPEC.value.drops:
        kept = tl.minimum(count, capacity)
    if SPEC.value.masked:
        expert = tl.arange(0, WIDTH)
        start = tl.minimum(expert, E) * capacity
        return kept, start, tl.minimum(expert + 1, E) * capacity
    else:
        size = kept
        if BLOCK > 0:
            size = (kept + (BLOCK - 1)) // BLOCK * BLOCK
        end = tl.cumsum(size, axis=0)
        return kept, end - size, end


@triton.jit
def write_counts(counts, offsets, num_dropped, count, kept, start, end, SPEC: tl.constexpr):
    """Write what the plan says of each expert; one program does."""
    E: tl.constexpr = SPEC.value.num_experts
    WIDTH: tl.constexpr = SPEC.value.width
    if tl.program_id(0) == 0:
        expert = tl.arange(0, WIDTH)
        tl.store(counts + expert, kept, mask=expert < E)
        tl.store(offsets + expert, start, mask=expert < E)
        tl.store(offsets + expert + 1, end, mask=expert == E - 1)
        if SPEC.value.drops:
            tl.store(num_dropped, tl.sum(count - kept, axis=0))


@triton.jit
def fill(tensor, first, end, value, TILE: tl.constexpr):
    """Write a value to the elements from ``first`` on, all programs together."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    lane = tl.arange(0, TILE)
    left = end - first
    # Tiles are counted, and not elements, whose sum with a stride may exceed int32.
    for tile in range(program, (left - 1) // TILE + 1, programs):
        inside = lane < left - tile * TILE
        at = first + tile * TILE + tl.where(inside, lane, 0)
        tl.store(tensor + at, value + tl.zeros_like(at), mask=inside)


@triton.jit
def fill_rows(order, kept, pairs, length, capacity, TILE: tl.constexpr):
    """Write the empty places of the rows of a masked plan, all programs together."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    lane = tl.arange(0, TILE)
    for tile in range(program, (length - 1) // TILE + 1, programs):
        inside = lane < length - tile * TILE
        place = tile * TILE + tl.where(inside, lane, 0)
        row = place // capacity
        empty = place - row * capacity >= tl.gather(kept, row, axis=0)
        tl.store(order + place, pairs + tl.zeros_like(place), mask=inside & empty)


@triton.jit
def fill_last_blocks(order, in_expert, place, placed, at, kept, pairs, SPEC: tl.constexpr):
    """Write the empty places of the last block of each expert; its last pair does that.

    :param in_expert: how many pairs of its expert are before each pair.
    """
    BLOCK: tl.constexpr = SPEC.value.block
    CHUNK: tl.constexpr = SPEC.value.chunk
    last = placed & (in_expert == tl.gather(kept, at, axis=0) - 1)
    # Few programs have the last pair of an expert.
    if tl.max(last.to(tl.int32), axis=0) > 0:
        left = tl.where(last, BLOCK - 1 - in_expert % BLOCK, 0)
        # Chunks are counted, and not places, whose sum with a chunk may exceed int32.
        for chunk in range((BLOCK - 2) // CHUNK + 1):
            lane = chunk * CHUNK + tl.arange(0, CHUNK)
            empty = (place + 1)[:, None] + lane[None, :]
            tl.store(
                order + empty, pairs + tl.zeros_like(empty), mask=lane[None, :] < left[:, None]
            )


@triton.jit
def rank_among(expert):
    """Return how many pairs before each one, of these, have its expert."""
    # [j, i] with j before i. Neighbouring threads hold neighbouring i, so that each thread adds up
    # its own j, and no sum crosses threads.
    lane = tl.arange(0, expert.shape[0])
    earlier = lane[:, None] < lane[None, :]
    same = (expert[:, None] == expert[None, :]) & earlier
    return tl.sum(same.to(tl.int32), axis=0)


@triton.jit
def place_pairs(
    order, inverse, block_experts, expert, rank, pair, inside, before, pairs_before, kept, start,
    total, pairs, capacity, SPEC: tl.constexpr, FILLED: tl.constexpr,
):  # fmt: skip
    """Give some consecutive pairs their places.

    :param rank: of each pair among these, by ``rank_among``.
    :param before: the pairs of each expert among the ``pairs_before`` pairs before these.
    :param kept: the pairs of each expert that have a place.
    :param total: the places of all experts.
    :param FILLED: whether an earlier launch has filled the empty places.
    """
    E: tl.constexpr = SPEC.value.num_experts
    WIDTH: tl.constexpr = SPEC.value.width
    BLOCK: tl.constexpr = SPEC.value.block
    at = tl.minimum(expert, WIDTH - 1)
    placed = inside & (expert < E)
    if SPEC.value.counts_to:
        in_expert = tl.gather(before, at, axis=0) + rank
        if SPEC.value.drops:
            placed = placed & (in_expert < capacity)
        place = tl.gather(start, at, axis=0) + in_expert
    else:  # one look-up less
        place = tl.gather(start + before, at, axis=0) + rank
    if BLOCK > 0:
        begins = placed & (in_expert % BLOCK == 0)
        tl.store(block_experts + place // BLOCK, expert, mask=begins)
        if not FILLED:
            fill_last_blocks(order, in_expert, place, placed, at, kept, pairs, SPEC)
    if SPEC.value.leaves_empty:
        tl.store(order + place, pair, mask=placed)
        tl.store(inverse + pair, tl.where(placed, place, -1), mask=inside)
    else:
        # Only if some pair of all has no place are there sums over threads.
        if total < pairs:
            without = (inside & (placed == 0)).to(tl.int32)
            placed_before = before
            if SPEC.value.drops:
                placed_before = tl.minimum(before, capacity)
            behind = total + pairs_before - tl.sum(placed_before, axis=0)
            place = tl.where(placed, place, behind + tl.cumsum(without, axis=0) - without)
        tl.store(order + place, pair, mask=inside)
        tl.store(inverse + pair, place, mask=inside)


@triton.jit
def place_all(
    order, inverse, counts, offsets, block_experts, num_dropped, expert, pair, inside, before,
    pairs_before, count, pairs, length, blocks, capacity, SPEC: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Place pairs as ``place_pairs`` does, and all programs together write the rest of the plan.

    :param count: all pairs of each expert.
    """
    BLOCK: tl.constexpr = SPEC.value.block
    kept, start, end = laid_out(count, capacity, SPEC)
    total = tl.max(end, axis=0)
    place_pairs(
        order, inverse, block_experts, expert, rank_among(expert), pair, inside, before,
        pairs_before, kept, start, total, pairs, capacity, SPEC, False,
    )  # fmt: skip
    write_counts(counts, offsets, num_dropped, count, kept, start, end, SPEC)
    if SPEC.value.masked:
        fill_rows(order, kept, pairs, length, capacity, TILE)
    elif BLOCK > 0:
        fill(order, total, length, pairs, TILE)
        fill(block_experts, total // BLOCK, blocks, -1, TILE)


@triton.jit
def count_pairs(
    partial, ids, row, groups, SPEC: tl.constexpr, SIZE: tl.constexpr, GROUP: tl.constexpr
):
    """Add some rows' pairs to ``partial [groups + blocks, width]``.

    A block has ``SIZE`` pairs, and a group ``GROUP`` blocks.

    :param ids: ``[ROWS, N]`` of the rows ``row [ROWS]``; any number that is no expert's is not
        counted.
    """
    E: tl.constexpr = SPEC.value.num_experts
    K: tl.constexpr = SPEC.value.topk
    WIDTH: tl.constexpr = SPEC.value.width
    pair = row.to(tl.int64)[:, None] * K + tl.arange(0, ids.shape[1])[None, :]
    block = pair // SIZE
    one = tl.full(ids.shape, 1, tl.int32)
    exists = (ids >= 0) & (ids < E)
    # Sums of integers are the same in whatever order they are added.
    tl.atomic_add(partial + (block // GROUP * WIDTH + ids), one, mask=exists, sem="relaxed")
    tl.atomic_add(partial + ((groups + block) * WIDTH + ids), one, mask=exists, sem="relaxed")


@triton.jit
def plan_row(
    ids, order, inverse, counts, offsets, block_experts, num_dropped, length, blocks, capacity,
    SPEC: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Plan a single row, whose ``ids [N]`` are in registers: -1 from K on."""
    E: tl.constexpr = SPEC.value.num_experts
    K: tl.constexpr = SPEC.value.topk
    WIDTH: tl.constexpr = SPEC.value.width
    pair = tl.arange(0, ids.shape[0])
    expert = tl.where((ids >= 0) & (ids < E), ids, E).to(tl.int32)
    place_all(
        order, inverse, counts, offsets, block_experts, num_dropped, expert, pair, pair < K,
        tl.zeros([WIDTH], tl.int32), 0, counted(expert, SPEC), K, length, blocks, capacity, SPEC,
        TILE,
    )  # fmt: skip


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def moe_routing_plan(
    ids, order, inverse, counts, offsets, block_experts, num_dropped,
    pairs, length, blocks, capacity, row_stride, slot_stride,
    SPEC: tl.constexpr, FLAT: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
    SEVERAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Plan in one launch: ``SIZE`` pairs a program, which counts all pairs, ``TILE`` at a time."""
    E: tl.constexpr = SPEC.value.num_experts
    WIDTH: tl.constexpr = SPEC.value.width
    first = tl.program_id(0) * SIZE
    lane = tl.arange(0, SIZE)
    inside = lane < pairs - first
    pair = first + tl.where(inside, lane, 0)
    launch_dependents(PDL)
    grid_dependency_wait(PDL)
    expert = expert_of_pair(ids, pair, inside, row_stride, slot_stride, SPEC, FLAT)
    before = tl.zeros([WIDTH], tl.int32)
    if SEVERAL:
        count = tl.zeros([WIDTH], tl.int32)
        other = tl.arange(0, TILE)
        for tile in range(0, pairs, TILE):
            here = other < pairs - tile
            its = tile + tl.where(here, other, 0)
            its_expert = expert_of_pair(ids, its, here, row_stride, slot_stride, SPEC, FLAT)
            count += counted(its_expert, SPEC)
            before += counted(tl.where(its < first, its_expert, E), SPEC)
    else:
        count = counted(expert, SPEC)
    place_all(
        order, inverse, counts, offsets, block_experts, num_dropped, expert, pair, inside, before,
        first, count, pairs, length, blocks, capacity, SPEC, TILE,
    )  # fmt: skip


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def moe_routing_plan_count(
    ids, partial, within, order, block_experts, pairs, length, blocks, row_stride, slot_stride,
    SPEC: tl.constexpr, FLAT: tl.constexpr, SIZE: tl.constexpr, GROUP: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Count the pairs of ``GROUP`` blocks of ``SIZE`` pairs: ``partial [groups, width]``.

    In ``within [blocks, width]`` it writes the counts of the blocks of the group before each one.
    In layouts with empty places it makes all places empty.
    """
    WIDTH: tl.constexpr = SPEC.value.width
    BLOCK: tl.constexpr = SPEC.value.block
    column = tl.arange(0, WIDTH)
    lane = tl.arange(0, SIZE)
    block = tl.program_id(0) * GROUP
    first = block * SIZE
    # There may be more counts than int32 numbers, before there are as many pairs.
    row = within + block.to(tl.int64) * WIDTH + column
    # In this order, no later launch of the plan begins before the ids are there: they may be read
    # there ahead of the wait.
    grid_dependency_wait(PDL)
    launch_dependents(PDL)
    inside = lane < pairs - first
    expert = expert_of_pair(
        ids, first + tl.where(inside, lane, 0), inside, row_stride, slot_stride, SPEC, FLAT
    )
    if SPEC.value.leaves_empty:
        fill(order, 0, length, pairs, SIZE)
    if BLOCK > 0:
        fill(block_experts, 0, blocks, -1, SIZE)
    count = tl.zeros([WIDTH], tl.int32)
    for tile in range(GROUP - 1):
        # The next pairs are on their way while these are counted.
        inside = lane < pairs - first - (tile + 1) * SIZE
        pair = first + tl.where(inside, (tile + 1) * SIZE + lane, 0)
        following = expert_of_pair(ids, pair, inside, row_stride, slot_stride, SPEC, FLAT)
        tl.store(row + tile * WIDTH, count)
        count += counted(expert, SPEC)
        expert = following
    if GROUP > 1:
        tl.store(row + (GROUP - 1) * WIDTH, count)
    at = partial + tl.program_id(0).to(tl.int64) * WIDTH + column
    tl.store(at, count + counted(expert, SPEC))


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def moe_routing_plan_scan(
    partial, groups, SPEC: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr
):
    """Replace each count by the sum of those of the groups before, and write the sum of all.

    A program takes an expert: a column of ``partial [groups + 1, width]``.
    """
    WIDTH: tl.constexpr = SPEC.value.width
    group = tl.arange(0, ROWS)
    column = partial + tl.program_id(0)
    launch_dependents(PDL)
    grid_dependency_wait(PDL)
    before = 0
    for first in range(0, groups, ROWS):
        inside = group < groups - first
        at = column + (first + group).to(tl.int64) * WIDTH
        count = tl.load(at, mask=inside, other=0)
        tl.store(at, before + tl.cumsum(count, axis=0) - count, mask=inside)
        before += tl.sum(count, axis=0)
    tl.store(column + tl.cast(groups, tl.int64) * WIDTH, before)


@triton.jit
def sums_of_groups(partial, groups, group, before, ROWS: tl.constexpr):
    """Return the sum of the counts of all groups, and ``before`` plus those of the groups before.

    :param partial: ``[groups, WIDTH]``.
    :param before: ``[WIDTH]``.
    :param ROWS: groups that are added at a time.
    """
    WIDTH: tl.constexpr = before.shape[0]
    column = tl.arange(0, WIDTH)
    count = tl.zeros([WIDTH], tl.int32)
    row = tl.arange(0, ROWS)
    for top in range(0, groups, ROWS):
        at = partial + (top + row)[:, None] * WIDTH + column[None, :]
        some = tl.load(at, mask=(row < groups - top)[:, None], other=0)
        count += tl.sum(some, axis=0)
        before += tl.sum(tl.where((row < group - top)[:, None], some, 0), axis=0)
    return count, before


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def moe_routing_plan_place(
    ids, partial, within, order, inverse, counts, offsets, block_experts, num_dropped,
    pairs, groups, capacity, row_stride, slot_stride,
    SPEC: tl.constexpr, FLAT: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, SCANNED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Place the ``SIZE`` pairs of a block, ``STEP`` at a time, given the counts of all blocks.

    :param partial: the counts of each group, or what ``moe_routing_plan_scan`` made of them.
    """
    WIDTH: tl.constexpr = SPEC.value.width
    program = tl.program_id(0)
    group = program // GROUP
    first = program * SIZE
    column = tl.arange(0, WIDTH)
    lane = tl.arange(0, STEP)
    inside = lane < pairs - first
    pair = first + tl.where(inside, lane, 0)
    # What needs no counts comes before the wait (``moe_routing_plan_count``).
    expert = expert_of_pair(ids, pair, inside, row_stride, slot_stride, SPEC, FLAT)
    rank = rank_among(expert)
    # Programs of the next kernel that wait here, in the places of this one's, slow it by up to 40 %
    # on an H100 (512 experts), so they are not let in before this one's have ended.
    grid_dependency_wait(PDL)
    if SCANNED:
        before = tl.load(partial + group.to(tl.int64) * WIDTH + column)
        count = tl.load(partial + tl.cast(groups, tl.int64) * WIDTH + column)
    else:
        before = tl.zeros([WIDTH], tl.int32)
        count, before = sums_of_groups(partial, groups, group, before, ROWS)
    if GROUP > 1:
        before += tl.load(within + program.to(tl.int64) * WIDTH + column)
    kept, start, end = laid_out(count, capacity, SPEC)
    total = tl.max(end, axis=0)
    write_counts(counts, offsets, num_dropped, count, kept, start, end, SPEC)
    for step in range(0, SIZE - STEP, STEP):
        # The next pairs are on their way while these are placed.
        next_inside = lane < pairs - first - step - STEP
        next_pair = first + tl.where(next_inside, step + STEP + lane, 0)
        next_expert = expert_of_pair(
            ids, next_pair, next_inside, row_stride, slot_stride, SPEC, FLAT
        )
        place_pairs(
            order, inverse, block_experts, expert, rank, pair, inside, before, first + step, kept,
            start, total, pairs, capacity, SPEC, True,
        )  # fmt: skip
        before += counted(expert, SPEC)
        inside, pair, expert = next_inside, next_pair, next_expert
        rank = rank_among(expert)
    place_pairs(
        order, inverse, block_experts, expert, rank, pair, inside, before, first + SIZE - STEP,
        kept, start, total, pairs, capacity, SPEC, True,
    )  # fmt: skip


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def moe_routing_plan_place_counted(
    ids, partial, order, inverse, counts, offsets, block_experts, num_dropped,
    pairs, groups, length, blocks, capacity,
    SPEC: tl.constexpr, SIZE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Place the ``SIZE`` pairs of a block, which the kernel that made the ids has counted.

    :param ids: contiguous.
    :param partial: what ``count_pairs`` has added to.
    """
    WIDTH: tl.constexpr = SPEC.value.width
    program = tl.program_id(0)
    first = program * SIZE
    column = tl.arange(0, WIDTH)
    lane = tl.arange(0, SIZE)
    inside = lane < pairs - first
    pair = first + tl.where(inside, lane, 0)
    # No early launch of the next kernel, like ``moe_routing_plan_place``: with it, some sizes took
    # 20 % longer, where the next kernel is ``gate``'s.
    grid_dependency_wait(PDL)
    expert = expert_of_pair(ids, pair, inside, 0, 0, SPEC, True)
    group = program // GROUP
    member = tl.arange(0, GROUP)
    of_blocks = partial + (groups + group * GROUP + member)[:, None] * WIDTH + column[None, :]
    earlier = (member < program - group * GROUP)[:, None]
    before = tl.sum(tl.load(of_blocks, mask=earlier, other=0), axis=0)
    count, before = sums_of_groups(partial, groups, group, before, ROWS)
    place_all(
        order, inverse, counts, offsets, block_experts, num_dropped, expert, pair, inside, before,
        first, count, pairs, length, blocks, capacity, SPEC, TILE,
    )  # fmt: skip
