"""The variant for many tokens where every expert's score costs something, and for groups.

Tile: ``[BLOCK_T, GROUPS * SIZE]``. A program reads whole rows as they lie in memory, 16 bytes a thread and whole cache lines
a warp, and scores them there, where a thread has the same experts in every row and so prepares their biases once. Then 32-bit
keys are handed over through shared memory: each of ``LANES`` threads a row gets ``SIZE * GROUPS / LANES`` experts of one
group, sorts them by networks in registers into the list of its ``WIDTH`` best, and lanes merge their lists, first within
a group; the lists of groups that lose are emptied before the last merges. About 30 instructions an expert for a sigmoid with
bias and groups.

A key has what fits into 32 bits with the place: of a score with a bias its place on a grid of 2**23 points, which reaches
from the lowest bias to the highest and the highest score (``grid_of``), and of other scores the high bits. So a group's
score, the sum of its best two, is known within bounds. Where the bounds of a kept and a lost group meet, or two neighbours
among the K best and the next share their high bits, the row is routed again by exact rounds, as the lanes variant does it:
one row in some thousand of normal logits, and one in two hundred without the grid.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_routing_backends.triton.early import wait_for_kernels_in_front
from moe_routing_backends.triton.finish import store_outputs
from moe_routing_backends.triton.keys import (
    FLOAT32_MAX,
    clean,
    narrow_key,
    ordered_key,
    rough_key,
    value_of_narrow,
    value_of_rough,
    with_place,
)
from moe_routing_backends.triton.lanes import route_by_rounds
from moe_routing_backends.triton.networks import best_across8, best_across16, in_columns, insert, sort8
from moe_routing_backends.triton.rows import split8
from moe_routing_backends.triton.scores import (
    activate,
    exp_of_many,
    selected_weights,
    selection_bias,
    selection_score,
    tree_sum,
)

TWO_TO_23 = tl.constexpr(8388608.0)
LOWEST_POINT = tl.constexpr(8)
"""The grid's lowest point, so that a key is never 0 whatever its place."""
HIGHEST_POINT = tl.constexpr(2**23 - 1)


@triton.jit
def join_lists(a, b, WIDTH: tl.constexpr):
    """Return the list ``(top, rest, lost)`` of the ``WIDTH`` highest of two lists; ``rest`` counts in lists of 16."""
    top, rest, lost = insert(a[0], a[1], tl.maximum(a[2], b[2]), b[0], WIDTH)
    if WIDTH != 8:
        top, rest, lost = insert(top, rest, lost, b[1], WIDTH)
    return top, rest, lost


@triton.jit
def list_of_8(tile):
    """Sort ``[ROWS, LANES, 8]`` into a list."""
    none = tl.zeros([tile.shape[0], tile.shape[1]], tl.uint32)
    return sort8(split8(tile)), (none, none, none, none, none, none, none, none), none


@triton.jit
def halves(tile):
    """Split ``[ROWS, LANES, N]`` into two of half as many."""
    return tl.split(tl.reshape(tile, [tile.shape[0], tile.shape[1], tile.shape[2] // 2, 2]))


@triton.jit
def list_of_16(tile, WIDTH: tl.constexpr):
    """Sort ``[ROWS, LANES, 16]`` into a list."""
    a, b = halves(tile)
    return join_lists(list_of_8(a), list_of_8(b), WIDTH)


@triton.jit
def list_of_32(tile, WIDTH: tl.constexpr):
    """Sort ``[ROWS, LANES, 32]`` into a list."""
    a, b = halves(tile)
    return join_lists(list_of_16(a, WIDTH), list_of_16(b, WIDTH), WIDTH)


@triton.jit
def list_of_lane(tile, WIDTH: tl.constexpr):
    """Sort the keys ``[ROWS, LANES, 8 to 64]`` of each lane into a list."""
    N: tl.constexpr = tile.shape[2]
    if N == 8:
        return list_of_8(tile)
    elif N == 16:
        return list_of_16(tile, WIDTH)
    elif N == 32:
        return list_of_32(tile, WIDTH)
    else:
        a, b = halves(tile)
        return join_lists(list_of_32(a, WIDTH), list_of_32(b, WIDTH), WIDTH)


@triton.jit
def best_across(found, AXIS: tl.constexpr, WIDTH: tl.constexpr):
    """Merge the lists along an axis."""
    t, r, lost = found
    if WIDTH == 8:
        m = tl.reduce((t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], lost), AXIS, best_across8)
        top = (m[0], m[1], m[2], m[3], m[4], m[5], m[6], m[7])
        return top, top, m[8]
    else:
        m = tl.reduce(
            (t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7], lost),
            AXIS,
            best_across16,
        )
        top = (m[0], m[1], m[2], m[3], m[4], m[5], m[6], m[7])
        return top, (m[8], m[9], m[10], m[11], m[12], m[13], m[14], m[15]), m[16]


@triton.jit
def shaped8(t, ROWS: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """Reshape each of a tuple of 8 to ``[ROWS, A, B]``."""
    return (
        tl.reshape(t[0], [ROWS, A, B]), tl.reshape(t[1], [ROWS, A, B]), tl.reshape(t[2], [ROWS, A, B]),
        tl.reshape(t[3], [ROWS, A, B]), tl.reshape(t[4], [ROWS, A, B]), tl.reshape(t[5], [ROWS, A, B]),
        tl.reshape(t[6], [ROWS, A, B]), tl.reshape(t[7], [ROWS, A, B]),
    )  # fmt: skip


@triton.jit
def emptied8(t, kept):
    """Set each of a tuple of 8 to 0 where not ``kept``."""
    return (
        tl.where(kept, t[0], 0), tl.where(kept, t[1], 0), tl.where(kept, t[2], 0), tl.where(kept, t[3], 0),
        tl.where(kept, t[4], 0), tl.where(kept, t[5], 0), tl.where(kept, t[6], 0), tl.where(kept, t[7], 0),
    )  # fmt: skip


@triton.jit
def grid_of(b, exists, SCORE: tl.constexpr):
    """Return the scale and the offset ``[1, 1]`` of the grid for scores with the biases ``b [1, N]``.

    A score t is at the point t * scale + offset, rounded; points are whole numbers of float32 from 2**23 to 2**24. Biases
    more than 64 below the highest are off it. The grid is so wide that no number on it is more than 8 times its width: the
    offset's rounding is less than the 64 points kept free at each end, and points are still closer than float32 is there.
    """
    highest = tl.max(tl.where(exists[None, :], b, -FLOAT32_MAX), axis=1)
    lowest = tl.maximum(tl.min(tl.where(exists[None, :], b, FLOAT32_MAX), axis=1), highest - 64.0)
    top = highest + (16.0 if SCORE == "sqrtsoftplus" else 1.0)
    width = tl.maximum(top - lowest, tl.maximum(tl.abs(top), tl.abs(lowest)) * 0.125)
    scale = (TWO_TO_23 - 128.0) / width
    offset = -lowest * scale + (TWO_TO_23 + 64.0)
    return scale[:, None], offset[:, None]


@triton.jit
def grid_key(t, place, scale, offset, MASK: tl.constexpr, SCORE: tl.constexpr):
    """Pack the point of a score on the grid and the complement of its place into one uint32, never 0.

    What is off the grid is at its ends. Only a sqrt-softplus can be off the upper one.
    """
    point = tl.fma(t, tl.broadcast_to(scale, t.shape), tl.broadcast_to(offset, t.shape))
    point = tl.maximum(point, TWO_TO_23 + LOWEST_POINT)
    if SCORE == "sqrtsoftplus":
        point = tl.minimum(point, TWO_TO_23 + HIGHEST_POINT)
    return with_place((point.to(tl.int32, bitcast=True) << 9).to(tl.uint32, bitcast=True), place, MASK)


@triton.jit
def highest_groups(rank, GROUPS: tl.constexpr, KEEP: tl.constexpr):
    """Tell which ``KEEP`` groups have the highest ``rank [ROWS, GROUPS]``, and the last of those ranks.

    Low bits of a rank make room for the complement of the group, so that no two are equal.
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
def choose_by_points(
    first, second, GROUPS: tl.constexpr, KEEP: tl.constexpr, MASK: tl.constexpr, SCORE: tl.constexpr
):  # fmt: skip
    """Choose the ``KEEP`` groups with the highest sums of their best two, given as grid keys ``[ROWS, GROUPS]``.

    :returns: which are kept, and for each row whether another choice is possible: 1 or 0.
    """
    first = ((first | MASK) ^ MASK) >> 9
    second = ((second | MASK) ^ MASK) >> 9
    total = first + second
    kept, worst = highest_groups(total * GROUPS, GROUPS, KEEP)
    best_lost = tl.max(tl.where(kept, 0, total), axis=1)
    # A sum of two is off by half a point for each, and where scores are up to 8 widths, by up to 8 for float32's rounding of
    # the sum; and points are cut where a place takes more than the 9 bits that are free.
    APART: tl.constexpr = 2 * 10 + 2 * (MASK // 512)
    unsure = (best_lost + APART >= worst // GROUPS).to(tl.int32)
    # Ends of the grid bound a score on one side only.
    unsure |= tl.max((kept & (second <= LOWEST_POINT)).to(tl.int32), axis=1)
    if SCORE == "sqrtsoftplus":
        unsure |= (tl.max(tl.where(kept, 0, first), axis=1) >= HIGHEST_POINT - MASK // 512).to(tl.int32)
    return kept, unsure


@triton.jit
def choose_groups(first, second, GROUPS: tl.constexpr, KEEP: tl.constexpr, TOP2: tl.constexpr, MASK: tl.constexpr):
    """Choose the ``KEEP`` best groups by their best two keys ``[ROWS, GROUPS]``, or by their best.

    A key with its place bits cleared or set bounds its score; so do the float32 sums of bounds, since rounding is monotonic.

    :returns: which are kept, and for each row whether another choice is possible: 1 or 0.
    """
    highest = first | MASK
    lowest = highest ^ MASK
    if TOP2:
        low = value_of_rough(lowest) + value_of_rough((second | MASK) ^ MASK)
        high = value_of_rough(highest) + value_of_rough(second | MASK)
        lowest = ordered_key(tl.minimum(tl.maximum(low, -FLOAT32_MAX), FLOAT32_MAX))
        highest = ordered_key(tl.minimum(tl.maximum(high, -FLOAT32_MAX), FLOAT32_MAX))
    kept, worst = highest_groups(lowest, GROUPS, KEEP)
    best_lost = tl.max(tl.where(kept, 0, highest), axis=1)
    return kept, (best_lost >= worst).to(tl.int32)


@triton.jit
def alike(a, b, MASK: tl.constexpr):
    """Tell (1 or 0) whether two rough keys share their high bits."""
    return ((a ^ b) <= MASK).to(tl.int32)


@triton.jit
def neighbours_alike(t, PAIRS: tl.constexpr, MASK: tl.constexpr):
    """Tell (1 or 0) whether two neighbours of the first ``PAIRS`` pairs of a list of 8 share their high bits."""
    found = alike(t[0], t[1], MASK)
    for i in tl.static_range(1, 7):
        if i < PAIRS:
            found |= alike(t[i], t[i + 1], MASK)
    return found


@triton.jit
def bias_of(bias, expert, exists, WHOLE: tl.constexpr, SELECTION: tl.constexpr):
    """Load the biases of a tile's experts."""
    b = tl.load(bias + expert) if WHOLE else tl.load(bias + expert, mask=exists, other=0.0)
    return selection_bias(b, SELECTION)[None, :]


@triton.jit(do_not_specialize=["T", "valid", "row_stride", "expert_stride", "per_expert_scale", "bias", "token_ids",
                               "expert_table", "num_valid_tokens", "expert_map", "vocabulary"])  # fmt: skip
def tiles_kernel(
    logits, weights, ids, per_expert_scale, bias, token_ids, expert_table, num_valid_tokens, expert_map,
    T: tl.int32, valid: tl.int32, row_stride: tl.int64, expert_stride: tl.int64, vocabulary: tl.int32,
    E: tl.constexpr, K: tl.constexpr, SHARED: tl.constexpr, ROW_STRIDE: tl.constexpr, EXPERT_STRIDE: tl.constexpr,
    SCORE: tl.constexpr, SELECTION: tl.constexpr, RENORMALIZE: tl.constexpr, EPSILON: tl.constexpr, FLOOR: tl.constexpr,
    SCALE: tl.constexpr, GROUPS: tl.constexpr, TOPK_GROUPS: tl.constexpr, TOP2: tl.constexpr, MULTIPLIER: tl.constexpr,
    CAP: tl.constexpr, ZERO_EXPERTS: tl.constexpr, VALID_ON_DEVICE: tl.constexpr, EARLY: tl.constexpr, SIZE: tl.constexpr,
    WIDTH: tl.constexpr, LANES: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Route ``BLOCK_T`` rows; ``GROUPS`` is a power of two, ``SIZE`` the experts of a group as one."""
    wait_for_kernels_in_front(EARLY)
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    readable = tl.minimum(row, T - 1).to(tl.int64)  # rows past the last read the last: no mask for them
    if ROW_STRIDE:
        first = logits + readable * ROW_STRIDE
    else:
        first = logits + tl.multiple_of(readable * row_stride, 4)  # the launcher has checked 16 bytes
    PER: tl.constexpr = E // GROUPS
    WHOLE: tl.constexpr = PER == SIZE
    MASK: tl.constexpr = triton.next_power_of_2(E) - 1
    GROUPED: tl.constexpr = TOPK_GROUPS < GROUPS
    GRID: tl.constexpr = SELECTION == "scores_plus_bias"
    NARROW: tl.constexpr = (SELECTION == "logits" and not TOP2) and logits.dtype.element_ty != tl.float32
    EXACT: tl.constexpr = RENORMALIZE and (EPSILON == 0.0 and FLOOR == 0.0)
    WHOLE_ROW: tl.constexpr = SCORE == "softmax" and (not EXACT or SELECTION == "scores_plus_bias")
    place = tl.arange(0, GROUPS * SIZE)
    expert = place if WHOLE else place // SIZE * PER + place % SIZE
    exists = place % SIZE < PER
    here = None if WHOLE else exists[None, :]
    zero = None if WHOLE else 0.0

    raw = tl.load(first[:, None] + expert[None, :], mask=here, other=zero)
    highest = tl.zeros([BLOCK_T], tl.float32)
    total = highest
    if WHOLE_ROW:
        x = tl.where(exists[None, :], activate(clean(raw), MULTIPLIER, CAP), -FLOAT32_MAX)
        highest = tl.max(x, axis=1)
        total = tree_sum(tl.where(exists[None, :], exp_of_many(x - highest[:, None]), 0.0), BLOCK_T, GROUPS * SIZE)
    share = tl.div_rn(1.0, total) if WHOLE_ROW else total
    if NARROW:
        key = narrow_key(raw, expert[None, :], MASK)
    else:
        b = raw if SELECTION == "logits" else bias_of(bias, expert, exists, WHOLE, SELECTION)
        t = selection_score(raw, b, highest[:, None], share[:, None], SELECTION, SCORE, MULTIPLIER, CAP)
        if GRID:
            scale, offset = grid_of(b, exists, SCORE)
            key = grid_key(t, expert[None, :], scale, offset, MASK, SCORE)
        else:
            key = rough_key(t, expert[None, :], MASK)
    if not WHOLE:
        key = tl.where(here, key, 0)

    found = list_of_lane(tl.reshape(key, [BLOCK_T, LANES, GROUPS * SIZE // LANES]), WIDTH)
    unsure = tl.zeros([BLOCK_T], tl.int32)
    if GROUPED:
        if LANES > GROUPS:
            top = shaped8(found[0], BLOCK_T, GROUPS, LANES // GROUPS)
            rest = shaped8(found[1], BLOCK_T, GROUPS, LANES // GROUPS)
            found = best_across((top, rest, tl.reshape(found[2], [BLOCK_T, GROUPS, LANES // GROUPS])), 2, WIDTH)
        first_of, second_of = found[0][0], found[0][1]
        if GRID and TOP2:
            kept, unsure = choose_by_points(first_of, second_of, GROUPS, TOPK_GROUPS, MASK, SCORE)
        else:
            kept, unsure = choose_groups(first_of, second_of, GROUPS, TOPK_GROUPS, TOP2, MASK)
        found = (emptied8(found[0], kept), emptied8(found[1], kept), tl.where(kept, found[2], 0))
    best, after, lost = best_across(found, 1, WIDTH)

    keys = in_columns(best, after, WIDTH)
    is_selected = (tl.arange(0, WIDTH) < K)[None, :]
    picked = tl.where(is_selected, MASK - (keys & MASK).to(tl.int32), 0)
    if NARROW:
        x = value_of_narrow(keys, MASK)
    else:
        x = clean(tl.load(first[:, None] + picked))
        unsure |= alike(best[K - 1] if K <= 8 else after[K - 9], lost, MASK) | neighbours_alike(best, K, MASK)
        if WIDTH > 8 and K > 7:
            unsure |= neighbours_alike(after, K - 8, MASK) | alike(best[7], after[0], MASK)
    x = activate(x, MULTIPLIER, CAP)
    w = selected_weights(
        x, is_selected, highest, total, SCORE, RENORMALIZE, EPSILON, FLOOR, SCALE, K, BLOCK_T, WIDTH
    )  # fmt: skip
    store_outputs(
        weights, ids, w, picked, row if NARROW else tl.where(unsure != 0, T, row), T, valid, num_valid_tokens,
        per_expert_scale, expert_map, E, K, SHARED, ZERO_EXPERTS, VALID_ON_DEVICE, WIDTH,
    )  # fmt: skip
    if not NARROW and tl.max(unsure, axis=0) != 0:
        for i in range(BLOCK_T):
            if tl.max(tl.where(tl.arange(0, BLOCK_T) == i, unsure, 0), axis=0) != 0:
                route_by_rounds(
                    tl.program_id(0) * BLOCK_T + i + tl.arange(0, 1), logits, weights, ids, per_expert_scale, bias,
                    token_ids, expert_table, num_valid_tokens, expert_map, T, valid, row_stride, expert_stride, 0, E, K,
                    SHARED, ROW_STRIDE, EXPERT_STRIDE, SCORE, SELECTION, RENORMALIZE, EPSILON, FLOOR, SCALE, GROUPS,
                    TOPK_GROUPS, TOP2, False, MULTIPLIER, CAP, ZERO_EXPERTS, 0.0, VALID_ON_DEVICE, GROUPS, SIZE, WIDTH, 1, 1,
                )  # fmt: skip
