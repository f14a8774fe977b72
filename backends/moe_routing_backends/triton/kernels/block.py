"""Block kernel, for many tokens where every expert's score is costly to compute, and for groups.

Tile: ``[BLOCK_T, GROUPS * SIZE]`` experts. A program reads whole rows as they lie in memory, 16
bytes a thread and whole cache lines a warp, and scores them in that layout: a thread has the same
experts in every row, so it prepares their biases once. Then 32-bit keys go through shared memory to
another layout. Each of ``THREADS_PER_ROW`` threads a row gets ``SIZE * GROUPS / THREADS_PER_ROW``
experts of one group and sorts them by networks in registers into the list of its ``WIDTH`` best.
Threads merge their lists, first within a group. The lists of groups that are not selected are
emptied before the last merges. Cost: about 30 instructions an expert for a sigmoid with bias and
groups.

A key holds what fits into 32 bits next to the index: of a score with a bias its point on a grid of
2**23 points, which reaches from the lowest bias to the highest bias plus the highest score
(``grid_of``); of other scores the high bits. So a group's score, the sum of its best two, is known
within bounds. Where the bounds of a kept and a dropped group meet, or two neighbours among the K
best and the next share their high bits, the row is routed again by exact rounds, as the cooperative
kernel does it: about one row in a thousand of normal logits; one in two hundred without the grid.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from moe_routing_backends.triton.device.chunks import split8
from moe_routing_backends.triton.device.epilogue import count_slots, store_outputs
from moe_routing_backends.triton.device.keys import (
    FLOAT32_MAX,
    clean,
    exact16_key,
    ordered_key,
    truncated_key,
    value_of_exact16,
    value_of_truncated,
    with_index,
)
from moe_routing_backends.triton.device.pdl import grid_dependency_wait
from moe_routing_backends.triton.device.scores import (
    activate,
    exp_of_many,
    selected_weights,
    selection_bias,
    selection_score,
    tree_sum,
)
from moe_routing_backends.triton.device.sorting_networks import (
    in_columns,
    insert,
    merge_lists,
    sort8,
)
from moe_routing_backends.triton.kernels.cooperative import route_by_rounds
from moe_routing_backends.triton.kernels.spec import (
    CHUNK,
    NOT_SPECIALIZED,
    WIDEST_LIST,
    Variant,
    list_width,
    next_power_of_two,
    one_warp,
    selects_by_value,
)

if TYPE_CHECKING:
    from moe_routing_backends.triton.kernels.spec import Launch
    from moe_routing_registry import RoutingProblem

TWO_TO_23 = tl.constexpr(8388608.0)
LOWEST_POINT = tl.constexpr(8)
"""The grid's lowest point, so that a key is never 0 whatever its index."""
HIGHEST_POINT = tl.constexpr(2**23 - 1)
BEST_OF_GROUP = 2
"""Experts whose sum is a group's score."""
MOST_SORTED = 64
"""Experts of a row that one thread sorts."""


@triton.jit
def join_lists(a, b, WIDTH: tl.constexpr):
    """Return the list ``(top, rest, lost)`` of the ``WIDTH`` highest of two lists.

    ``rest`` counts in lists of 16.
    """
    top, rest, lost = insert(a[0], a[1], tl.maximum(a[2], b[2]), b[0], WIDTH)
    if WIDTH != 8:
        top, rest, lost = insert(top, rest, lost, b[1], WIDTH)
    return top, rest, lost


@triton.jit
def list_of_8(tile):
    """Sort ``[ROWS, THREADS_PER_ROW, 8]`` into a list."""
    none = tl.zeros([tile.shape[0], tile.shape[1]], tl.uint32)
    return sort8(split8(tile)), (none, none, none, none, none, none, none, none), none


@triton.jit
def split_in_two(tile):
    """Split ``[ROWS, THREADS_PER_ROW, N]`` into two of half as many."""
    # Even and odd columns: for a list of the best any two halves will do.
    return tl.split(tl.reshape(tile, [tile.shape[0], tile.shape[1], tile.shape[2] // 2, 2]))


@triton.jit
def list_of_16(tile, WIDTH: tl.constexpr):
    """Sort ``[ROWS, THREADS_PER_ROW, 16]`` into a list."""
    a, b = split_in_two(tile)
    return join_lists(list_of_8(a), list_of_8(b), WIDTH)


@triton.jit
def list_of_32(tile, WIDTH: tl.constexpr):
    """Sort ``[ROWS, THREADS_PER_ROW, 32]`` into a list."""
    a, b = split_in_two(tile)
    return join_lists(list_of_16(a, WIDTH), list_of_16(b, WIDTH), WIDTH)


@triton.jit
def list_of_lane(tile, WIDTH: tl.constexpr):
    """Sort the keys ``[ROWS, THREADS_PER_ROW, 8 to 64]`` of each thread into a list."""
    N: tl.constexpr = tile.shape[2]
    if N == 8:
        return list_of_8(tile)
    elif N == 16:
        return list_of_16(tile, WIDTH)
    elif N == 32:
        return list_of_32(tile, WIDTH)
    else:
        a, b = split_in_two(tile)
        return join_lists(list_of_32(a, WIDTH), list_of_32(b, WIDTH), WIDTH)


@triton.jit
def shaped8(t, ROWS: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """Reshape each of a tuple of 8 to ``[ROWS, A, B]``."""
    return (
        tl.reshape(t[0], [ROWS, A, B]), tl.reshape(t[1], [ROWS, A, B]),
        tl.reshape(t[2], [ROWS, A, B]), tl.reshape(t[3], [ROWS, A, B]),
        tl.reshape(t[4], [ROWS, A, B]), tl.reshape(t[5], [ROWS, A, B]),
        tl.reshape(t[6], [ROWS, A, B]), tl.reshape(t[7], [ROWS, A, B]),
    )  # fmt: skip


@triton.jit
def emptied8(t, kept):
    """Set each of a tuple of 8 to 0 where not ``kept``."""
    return (
        tl.where(kept, t[0], 0), tl.where(kept, t[1], 0), tl.where(kept, t[2], 0),
        tl.where(kept, t[3], 0), tl.where(kept, t[4], 0), tl.where(kept, t[5], 0),
        tl.where(kept, t[6], 0), tl.where(kept, t[7], 0),
    )  # fmt: skip


@triton.jit
def grid_of(b, exists, SPEC: tl.constexpr):
    """Return scale and offset ``[1, 1]`` of the grid for scores with the biases ``b [1, N]``.

    A score t is at the point t * scale + offset, rounded; points are whole numbers of float32 from
    2**23 to 2**24. Biases more than 64 below the highest are off it. The grid is so wide that no
    number on it is more than 8 times its width: the offset's rounding is less than the 64 points
    kept free at each end, and points are still closer than float32 is there.
    """
    SCORE: tl.constexpr = SPEC.value.score
    highest = tl.max(tl.where(exists[None, :], b, -FLOAT32_MAX), axis=1)
    lowest = tl.maximum(tl.min(tl.where(exists[None, :], b, FLOAT32_MAX), axis=1), highest - 64.0)
    top = highest + (16.0 if SCORE == "sqrtsoftplus" else 1.0)
    width = tl.maximum(top - lowest, tl.maximum(tl.abs(top), tl.abs(lowest)) * 0.125)
    scale = (TWO_TO_23 - 128.0) / width
    offset = -lowest * scale + (TWO_TO_23 + 64.0)
    return scale[:, None], offset[:, None]


@triton.jit
def grid_key(t, index, scale, offset, MASK: tl.constexpr, SPEC: tl.constexpr):
    """Pack a score's point on the grid and the complement of its index into one uint32, never 0.

    What is off the grid is at its ends. Only a sqrt-softplus can be off the upper one.
    """
    point = tl.fma(t, tl.broadcast_to(scale, t.shape), tl.broadcast_to(offset, t.shape))
    point = tl.maximum(point, TWO_TO_23 + LOWEST_POINT)
    SCORE: tl.constexpr = SPEC.value.score
    if SCORE == "sqrtsoftplus":
        point = tl.minimum(point, TWO_TO_23 + HIGHEST_POINT)
    return with_index(
        (point.to(tl.int32, bitcast=True) << 9).to(tl.uint32, bitcast=True), index, MASK
    )


@triton.jit
def highest_groups(rank, GROUPS: tl.constexpr, KEEP: tl.constexpr):
    """Tell which ``KEEP`` groups have the highest ``rank [ROWS, GROUPS]``.

    Return also the lowest of their ranks. Low bits of a rank make room for the complement of the
    group, so that no two are equal.
    """
    LOW: tl.constexpr = GROUPS - 1
    left = (rank | LOW) ^ tl.arange(0, GROUPS).to(tl.uint32)[None, :]
    worst = tl.max(left, axis=1)
    left = tl.where(left == worst[:, None], 0, left)
    for _ in tl.static_range(KEEP - 1):
        worst = tl.max(left, axis=1)
        left = tl.where(left == worst[:, None], 0, left)
    return left == 0, (worst | LOW) ^ LOW


@triton.jit
def choose_by_points(first, second, MASK: tl.constexpr, SPEC: tl.constexpr):
    """Choose the groups with the highest sums of their best two grid keys.

    :param first, second: grid keys ``[ROWS, GROUPS]`` of the best and the second of each group.
    :returns: which are kept, and for each row whether another choice is possible: 1 or 0.
    """
    GROUPS: tl.constexpr = SPEC.value.num_groups
    KEEP: tl.constexpr = SPEC.value.topk_groups
    SCORE: tl.constexpr = SPEC.value.score
    first = ((first | MASK) ^ MASK) >> 9
    second = ((second | MASK) ^ MASK) >> 9
    total = first + second
    kept, worst = highest_groups(total * GROUPS, GROUPS, KEEP)
    best_lost = tl.max(tl.where(kept, 0, total), axis=1)
    # A sum of two is off by half a point for each, and where scores are up to 8 widths, by up to 8
    # for float32's rounding of the sum; and points are cut where an index takes more than the 9
    # bits that are free.
    APART: tl.constexpr = 2 * 10 + 2 * (MASK // 512)
    unsure = (best_lost + APART >= worst // GROUPS).to(tl.int32)
    # Ends of the grid bound a score on one side only.
    unsure |= tl.max((kept & (second <= LOWEST_POINT)).to(tl.int32), axis=1)
    if SCORE == "sqrtsoftplus":
        unsure |= (tl.max(tl.where(kept, 0, first), axis=1) >= HIGHEST_POINT - MASK // 512).to(
            tl.int32
        )
    return kept, unsure


@triton.jit
def choose_groups(first, second, MASK: tl.constexpr, SPEC: tl.constexpr):
    """Choose the best groups by their best two keys ``[ROWS, GROUPS]``, or by their best.

    A key with its index bits cleared or set bounds its score; so do the float32 sums of bounds,
    since rounding is monotonic.

    :returns: which are kept, and for each row whether another choice is possible: 1 or 0.
    """
    GROUPS: tl.constexpr = SPEC.value.num_groups
    KEEP: tl.constexpr = SPEC.value.topk_groups
    TOP2: tl.constexpr = SPEC.value.sums_best_two
    highest = first | MASK
    lowest = highest ^ MASK
    if TOP2:
        low = value_of_truncated(lowest) + value_of_truncated((second | MASK) ^ MASK)
        high = value_of_truncated(highest) + value_of_truncated(second | MASK)
        # Sums are clamped as the contract says, and become keys again to be ranked as integers.
        least = ordered_key(tl.minimum(tl.maximum(low, -FLOAT32_MAX), FLOAT32_MAX))
        most = ordered_key(tl.minimum(tl.maximum(high, -FLOAT32_MAX), FLOAT32_MAX))
    else:
        least = lowest
        most = highest
    kept, worst = highest_groups(least, GROUPS, KEEP)
    best_lost = tl.max(tl.where(kept, 0, most), axis=1)
    return kept, (best_lost >= worst).to(tl.int32)


@triton.jit
def alike(a, b, MASK: tl.constexpr):
    """Tell (1 or 0) whether two rough keys share their high bits."""
    return ((a ^ b) <= MASK).to(tl.int32)


@triton.jit
def neighbours_alike(t, PAIRS: tl.constexpr, MASK: tl.constexpr):
    """Tell (1 or 0) whether two neighbours of a list of 8 share their high bits.

    Only the first ``PAIRS`` pairs are compared.
    """
    found = alike(t[0], t[1], MASK)
    for i in tl.static_range(1, 7):
        if i < PAIRS:
            found |= alike(t[i], t[i + 1], MASK)
    return found


@triton.jit
def bias_of(bias, expert, exists, WHOLE: tl.constexpr, SPEC: tl.constexpr):
    """Load the biases of a tile's experts."""
    b = tl.load(bias + expert) if WHOLE else tl.load(bias + expert, mask=exists, other=0.0)
    return selection_bias(b, SPEC)[None, :]


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def moe_routing_block(
    logits, weights, ids, per_expert_scale, bias, token_ids, expert_table, num_valid_tokens,
    expert_map, counts, replica_count, most_replicas, T: tl.int32, valid: tl.int32,
    row_stride: tl.int64, expert_stride: tl.int64, vocabulary: tl.int32, SPEC: tl.constexpr,
    ROW_STRIDE: tl.constexpr, EXPERT_STRIDE: tl.constexpr, VALID_ON_DEVICE: tl.constexpr,
    PDL: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, THREADS_PER_ROW: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Route ``BLOCK_T`` rows.

    Groups are a power of two, ``SIZE`` is the experts of a group as one.
    """
    E: tl.constexpr = SPEC.value.num_experts
    K: tl.constexpr = SPEC.value.topk
    SELECTION: tl.constexpr = SPEC.value.selection
    GROUPS: tl.constexpr = SPEC.value.num_groups
    TOP2: tl.constexpr = SPEC.value.sums_best_two
    grid_dependency_wait(PDL)
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    # Rows past the last read the last: no mask for them.
    readable = tl.minimum(row, T - 1).to(tl.int64)
    if ROW_STRIDE:
        first = logits + readable * ROW_STRIDE
    else:
        # The launcher has checked 16 bytes.
        first = logits + tl.multiple_of(readable * row_stride, 4)
    PER: tl.constexpr = E // GROUPS
    WHOLE: tl.constexpr = PER == SIZE
    MASK: tl.constexpr = triton.next_power_of_2(E) - 1
    TOPK_GROUPS: tl.constexpr = SPEC.value.topk_groups
    GROUPED: tl.constexpr = TOPK_GROUPS < GROUPS
    SCALE: tl.constexpr = SPEC.value.scale
    GRID: tl.constexpr = SELECTION == "scores_plus_bias"
    EXACT16: tl.constexpr = (
        SELECTION == "logits" and not TOP2
    ) and logits.dtype.element_ty != tl.float32
    WHOLE_ROW: tl.constexpr = SPEC.value.normalizes_whole_row
    index = tl.arange(0, GROUPS * SIZE)
    expert = index if WHOLE else index // SIZE * PER + index % SIZE
    exists = index % SIZE < PER
    here = None if WHOLE else exists[None, :]
    zero = None if WHOLE else 0.0

    raw = tl.load(first[:, None] + expert[None, :], mask=here, other=zero)
    highest = tl.zeros([BLOCK_T], tl.float32)
    total = highest
    if WHOLE_ROW:
        x = tl.where(exists[None, :], activate(clean(raw), SPEC), -FLOAT32_MAX)
        highest = tl.max(x, axis=1)
        total = tree_sum(tl.where(exists[None, :], exp_of_many(x - highest[:, None]), 0.0))
    share = tl.div_rn(1.0, total) if WHOLE_ROW else total
    if EXACT16:
        key = exact16_key(raw, expert[None, :], MASK)
    else:
        b = raw if SELECTION == "logits" else bias_of(bias, expert, exists, WHOLE, SPEC)
        t = selection_score(raw, b, highest[:, None], share[:, None], SPEC)
        if GRID:
            scale, offset = grid_of(b, exists, SPEC)
            key = grid_key(t, expert[None, :], scale, offset, MASK, SPEC)
        else:
            key = truncated_key(t, expert[None, :], MASK)
    if not WHOLE:
        key = tl.where(here, key, 0)

    # From the layout of the loads to one share of a group a thread: here the keys go through shared
    # memory.
    found = list_of_lane(
        tl.reshape(key, [BLOCK_T, THREADS_PER_ROW, GROUPS * SIZE // THREADS_PER_ROW]), WIDTH
    )
    unsure = tl.zeros([BLOCK_T], tl.int32)
    if GROUPED:
        if THREADS_PER_ROW > GROUPS:
            # Threads of one group next to each other, so that their lists can be merged along an
            # axis.
            top = shaped8(found[0], BLOCK_T, GROUPS, THREADS_PER_ROW // GROUPS)
            rest = shaped8(found[1], BLOCK_T, GROUPS, THREADS_PER_ROW // GROUPS)
            left_out = tl.reshape(found[2], [BLOCK_T, GROUPS, THREADS_PER_ROW // GROUPS])
            found = merge_lists(top, rest, left_out, 2, WIDTH)
        first_of, second_of = found[0][0], found[0][1]
        if GRID and TOP2:
            kept, unsure = choose_by_points(first_of, second_of, MASK, SPEC)
        else:
            kept, unsure = choose_groups(first_of, second_of, MASK, SPEC)
        found = (emptied8(found[0], kept), emptied8(found[1], kept), tl.where(kept, found[2], 0))
    best, after, lost = merge_lists(found[0], found[1], found[2], 1, WIDTH)

    keys = in_columns(best, after, WIDTH)
    is_selected = (tl.arange(0, WIDTH) < K)[None, :]
    picked = tl.where(is_selected, MASK - (keys & MASK).to(tl.int32), 0)
    if EXACT16:
        x = value_of_exact16(keys, MASK)
    else:
        x = clean(tl.load(first[:, None] + picked))
        last_alike = alike(best[K - 1] if K <= 8 else after[K - 9], lost, MASK)
        unsure |= last_alike | neighbours_alike(best, K, MASK)
        if WIDTH > 8 and K > 7:
            unsure |= neighbours_alike(after, K - 8, MASK) | alike(best[7], after[0], MASK)
    its_row = row if EXACT16 else tl.where(unsure != 0, T, row)
    if counts is not None:
        count_slots(
            counts, picked, its_row, T, valid, num_valid_tokens, SPEC, VALID_ON_DEVICE,
        )  # fmt: skip
    x = activate(x, SPEC)
    w = selected_weights(x, is_selected, highest, total, SPEC, SCALE)
    store_outputs(
        weights, ids, w, picked, its_row, T, valid, num_valid_tokens, per_expert_scale, expert_map,
        replica_count, most_replicas, SPEC, VALID_ON_DEVICE,
    )  # fmt: skip
    if not EXACT16 and tl.max(unsure, axis=0) != 0:
        for i in range(BLOCK_T):
            if tl.max(tl.where(tl.arange(0, BLOCK_T) == i, unsure, 0), axis=0) != 0:
                route_by_rounds(
                    tl.program_id(0) * BLOCK_T + i + tl.arange(0, 1), logits, weights, ids,
                    per_expert_scale, bias, token_ids, expert_table, num_valid_tokens, expert_map,
                    counts, replica_count, most_replicas, T, valid, row_stride, expert_stride, 0,
                    SPEC, ROW_STRIDE, EXPERT_STRIDE, VALID_ON_DEVICE, GROUPS, SIZE, WIDTH, 1, 1,
                )  # fmt: skip


def supports(problem: RoutingProblem, launch: Launch) -> bool:
    """Serve powers of two of groups, if a thread can sort its share in registers."""
    spec, threads = problem.spec, launch.threads_per_row
    groups, per_group = spec.num_groups, problem.num_experts // spec.num_groups
    # With groups, Triton 3.6 may compile lists of 16 for minutes.
    longest = WIDEST_LIST if groups == 1 else CHUNK
    tile = groups * next_power_of_two(per_group)
    return (
        selects_by_value(problem)
        and problem.topk + spec.shared_experts <= longest
        and groups == next_power_of_two(groups)
        and per_group >= BEST_OF_GROUP
        and groups <= threads
        and CHUNK * threads <= tile <= MOST_SORTED * threads
    )


def constants(problem: RoutingProblem, launch: Launch) -> dict[str, Any]:
    """Pad the experts of a group to a power of two."""
    return {
        "SIZE": next_power_of_two(problem.num_experts // problem.spec.num_groups),
        "WIDTH": list_width(problem),
        "THREADS_PER_ROW": launch.threads_per_row,
    }


VARIANT = Variant(moe_routing_block, supports, constants, partial(one_warp, "block"))
