"""The variant for many tokens: each thread (or ``LANES`` neighbours) owns a row and sorts it in registers.

Tile: ``[BLOCK_T, LANES]`` rows; a row is read in chunks of 8 experts, 16 bytes a load, and each chunk goes through a sorting
network into the list of the ``WIDTH`` highest keys; lanes of one row merge their lists at the end. No shuffles within a row,
about 14 integer instructions an expert for 16-bit logits and 17 for float32.

Keys are 32 bits, so that a comparator is two instructions. 16-bit logits and the place fit in exactly. Of a float32 score
only the high bits fit with the place (25 of them at E = 128), so the list may misorder scores that share those. Hence the
``WIDTH`` selected are read again and sorted exactly; and if the best key left out shares the high bits of the K-th, the block
reads its rows once more for each selected expert of that bucket. Logits that were 16-bit before have no low bits to lose,
and never need that.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_routing_backends.triton.early import let_the_next_start, wait_for_kernels_in_front
from moe_routing_backends.triton.finish import store_outputs
from moe_routing_backends.triton.keys import (
    FLOAT32_MAX,
    clean,
    narrow_key,
    ordered_key,
    rough_key,
    value_of_key,
    value_of_narrow,
)
from moe_routing_backends.triton.networks import (
    best_across8,
    best_across16,
    in_columns,
    insert,
    merge16,
    over_lanes,
    sort8,
)
from moe_routing_backends.triton.scores import (
    activate,
    exp_of_many,
    selected_weights,
    selection_bias,
    selection_score,
    tree_sum,
)


@triton.jit
def split8(tile):
    """Split ``[ROWS, LANES, 8]`` into 8 tensors ``[ROWS, LANES]``."""
    ROWS: tl.constexpr = tile.shape[0]
    LANES: tl.constexpr = tile.shape[1]
    even, odd = tl.split(tl.reshape(tile, [ROWS, LANES, 2, 2, 2]))
    x04, x26 = tl.split(even)
    x15, x37 = tl.split(odd)
    x0, x4 = tl.split(x04)
    x2, x6 = tl.split(x26)
    x1, x5 = tl.split(x15)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def load_chunk(first, chunk, known):
    """Load the 8 logits of ``chunk [ROWS, LANES]``, as ``[ROWS, LANES, 8]``; 0 where not ``known`` (``None``: all are)."""
    base = first[:, None, None] + (chunk * 8)[:, :, None]
    mask = None if known is None else known[:, :, None]
    other = None if known is None else 0.0
    BITS: tl.constexpr = first.dtype.element_ty.primitive_bitwidth
    if BITS == 16:
        return tl.load(base + tl.arange(0, 8)[None, None, :], mask=mask, other=other)
    else:
        # Two loads of 16 bytes: of one load of 32, Triton would give half to the neighbour thread.
        low = tl.load(base + tl.arange(0, 4)[None, None, :], mask=mask, other=other)
        high = tl.load(base + 4 + tl.arange(0, 4)[None, None, :], mask=mask, other=other)
        return tl.reshape(tl.permute(tl.join(low, high), [0, 1, 3, 2]), [low.shape[0], low.shape[1], 8])


@triton.jit
def either(a, b):
    """Combine bits."""
    return a | b


@triton.jit
def count_of(chosen):
    """Count the columns ``chosen [ROWS, N]`` of each row.

    In float32, because of Triton 3.6's LLVM: it looks through sums of integers in loops, and here compiles for minutes.
    """
    return tl.sum(tl.where(chosen, 1.0, 0.0), axis=1).to(tl.int32)


@triton.jit
def exact_key(t, place):
    """Pack a clean float32 and its place into one uint64: higher score first, then lower place; never 0."""
    return (ordered_key(t).to(tl.uint64) << 32) | (0xFFFF - place).to(tl.uint64)


@triton.jit
def from_exact(exact, is_selected, first, SELECTION: tl.constexpr):
    """Return the places in ``exact [ROWS, N]``, 0 where not selected, and the clean logits that stand there."""
    picked = tl.where(is_selected, 0xFFFF - (exact & 0xFFFF).to(tl.int32), 0)
    if SELECTION == "logits":
        x = value_of_key((exact >> 32).to(tl.uint32))
    else:
        x = clean(tl.load(first[:, None] + picked))
    return picked, x


@triton.jit
def sum_of_steps(
    first, highest, STEPS: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    MULTIPLIER: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Sum e**(x - highest) over ``STEPS`` steps, a power of two, of ``LANES`` chunks, in ``tree_sum``'s shape.

    ``sums`` is a stack, ``(latest, those below)``, of sums over 1, 2, 4, ... steps: two of a size are added at once.
    """
    sums = highest  # the stack's bottom, which is never read
    for i in tl.static_range(STEPS):
        if i * LANES < CHUNKS:
            chunk = i * LANES + tl.arange(0, LANES)[None, :] + tl.zeros([ROWS, 1], tl.int32)
            known = chunk < CHUNKS
            x = activate(clean(load_chunk(first, chunk, known)), MULTIPLIER, CAP)
            p = tl.where(known[:, :, None], exp_of_many(tl.minimum(x - highest[:, None, None], 0.0)), 0.0)
            step = tree_sum(tl.reshape(p, [ROWS, LANES * 8]), ROWS, LANES * 8)
        else:
            step = tl.zeros([ROWS], tl.float32)
        for doublings in tl.static_range(1, 8):
            if (i + 1) % (1 << doublings) == 0:
                step = sums[0] + step
                sums = sums[1]
        sums = (step, sums)
    return sums[0]


@triton.jit
def highest_of_row(
    first, STEPS: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    MULTIPLIER: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Return the highest activated logit of each row."""
    found = tl.full([ROWS, LANES], -FLOAT32_MAX, tl.float32)
    for i in range(STEPS):
        chunk = i * LANES + tl.arange(0, LANES)[None, :] + tl.zeros([ROWS, 1], tl.int32)
        known = chunk < CHUNKS
        x = activate(clean(load_chunk(first, chunk, known)), MULTIPLIER, CAP)
        found = tl.maximum(found, tl.where(known, tl.max(x, axis=2), -FLOAT32_MAX))
    return tl.max(found, axis=1)


@triton.jit
def best_of_bucket(
    exact, bucket, first_column, count, first, bias, highest, share, lane, STEPS: tl.constexpr, CHUNKS: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, MASK: tl.constexpr, SELECTION: tl.constexpr, SCORE: tl.constexpr,
    MULTIPLIER: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Fill ``count`` columns of ``exact`` from ``first_column`` on with the best exact keys of a bucket, one scan a key.

    A bucket is the experts whose rough keys share the high bits, ``bucket [ROWS]``. Rows of count 0 keep what they have.
    """
    column = tl.arange(0, WIDTH)[None, :]
    last = tl.zeros([ROWS], tl.uint64) - 1
    rounds = tl.max(count, axis=0)
    k = 0
    while k < rounds:
        best = tl.zeros(lane.shape, tl.uint64)
        for i in range(STEPS):
            chunk = tl.minimum(lane + i * lane.shape[1], CHUNKS - 1)
            place = (chunk * 8)[:, :, None] + tl.arange(0, 8)[None, None, :]
            raw = load_chunk(first, chunk, None)
            b = raw if bias is None else selection_bias(tl.load(bias + place), SELECTION)
            t = selection_score(raw, b, highest[:, None, None], share[:, None, None], SELECTION, SCORE, MULTIPLIER, CAP)
            key = exact_key(t, place)
            inside = ((rough_key(t, place, MASK) | MASK) == bucket[:, None, None]) & (key < last[:, None, None])
            best = tl.maximum(best, tl.max(tl.where(inside, key, 0), axis=2))
        last = tl.max(best, axis=1)
        exact = tl.where((column == (first_column + k)[:, None]) & (k < count)[:, None], last[:, None], exact)
        k += 1
    return exact


@triton.jit(do_not_specialize=["T", "valid", "row_stride", "expert_stride", "per_expert_scale", "bias", "token_ids",
                               "expert_table", "num_valid_tokens", "expert_map", "vocabulary"])  # fmt: skip
def rows_kernel(
    logits, weights, ids, per_expert_scale, bias, token_ids, expert_table, num_valid_tokens, expert_map,
    T: tl.int32, valid: tl.int32, row_stride: tl.int64, expert_stride: tl.int64, vocabulary: tl.int32,
    E: tl.constexpr, K: tl.constexpr, SHARED: tl.constexpr, ROW_STRIDE: tl.constexpr, EXPERT_STRIDE: tl.constexpr,
    SCORE: tl.constexpr, SELECTION: tl.constexpr, RENORMALIZE: tl.constexpr, EPSILON: tl.constexpr, FLOOR: tl.constexpr,
    SCALE: tl.constexpr, MULTIPLIER: tl.constexpr, CAP: tl.constexpr, ZERO_EXPERTS: tl.constexpr,
    VALID_ON_DEVICE: tl.constexpr, EARLY: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Route ``BLOCK_T`` rows by ``LANES`` threads each; E is a multiple of 8, ``K + SHARED <= WIDTH``, 8 or 16."""
    let_the_next_start(EARLY)
    wait_for_kernels_in_front(EARLY)
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    readable = tl.minimum(row, T - 1).to(tl.int64)  # rows past the last read the last: no mask on any load
    if ROW_STRIDE:
        first = logits + readable * ROW_STRIDE
    else:
        first = logits + tl.multiple_of(readable * row_stride, 4)  # the launcher has checked 16 bytes
    CHUNKS: tl.constexpr = E // 8
    STEPS: tl.constexpr = (CHUNKS + LANES - 1) // LANES
    POWER: tl.constexpr = triton.next_power_of_2(STEPS)
    WHOLE: tl.constexpr = CHUNKS % LANES == 0
    NARROW: tl.constexpr = SELECTION == "logits" and logits.dtype.element_ty != tl.float32
    MASK: tl.constexpr = triton.next_power_of_2(E) - 1
    EXACT: tl.constexpr = RENORMALIZE and (EPSILON == 0.0 and FLOOR == 0.0)
    SOFTMAX_KEYS: tl.constexpr = SCORE == "softmax" and SELECTION == "scores_plus_bias"
    WHOLE_ROW: tl.constexpr = SCORE == "softmax" and (not EXACT or SOFTMAX_KEYS)
    lane = tl.arange(0, LANES)[None, :] + tl.zeros([BLOCK_T, 1], tl.int32)
    highest = tl.zeros([BLOCK_T], tl.float32)
    total = highest
    if SOFTMAX_KEYS or (WHOLE_ROW and CAP != 0.0):
        highest = highest_of_row(first, STEPS, CHUNKS, BLOCK_T, LANES, MULTIPLIER, CAP)
        total = sum_of_steps(first, highest, POWER, CHUNKS, BLOCK_T, LANES, MULTIPLIER, CAP)
    share = tl.div_rn(1.0, total) if SOFTMAX_KEYS else total

    lost = tl.zeros([BLOCK_T, LANES], tl.uint32)
    top = (lost, lost, lost, lost, lost, lost, lost, lost)
    rest = top
    dust = tl.zeros([BLOCK_T, LANES], tl.int32)
    for outer in range(0, STEPS, UNROLL):
        for inner in tl.static_range(UNROLL):
            chunk = lane + (outer + inner) * LANES
            known = None if WHOLE else chunk < CHUNKS
            raw = load_chunk(first, chunk, known)
            place = (chunk * 8)[:, :, None] + tl.arange(0, 8)[None, None, :]
            if NARROW:
                key = narrow_key(raw, place, MASK)
            else:
                b = raw
                if SELECTION != "logits":
                    b = selection_bias(tl.load(bias + (place if WHOLE else tl.minimum(place, E - 1))), SELECTION)
                t = selection_score(raw, b, highest[:, None, None], share[:, None, None], SELECTION, SCORE, MULTIPLIER, CAP)
                key = rough_key(t, place, MASK)
                d0, d1, d2, d3, d4, d5, d6, d7 = split8(t.to(tl.int32, bitcast=True))
                dust |= (d0 | d1 | d2) | (d3 | d4 | d5) | (d6 | d7)
            if not WHOLE:
                key = tl.where(known[:, :, None], key, 0)
            top, rest, lost = insert(top, rest, lost, sort8(split8(key)), WIDTH)
    column = tl.arange(0, WIDTH)
    is_selected = (column < K)[None, :]
    if WIDTH == 8:
        merged = tl.reduce((top[0], top[1], top[2], top[3], top[4], top[5], top[6], top[7], lost), 1, best_across8)
        best = (merged[0], merged[1], merged[2], merged[3], merged[4], merged[5], merged[6], merged[7])
        after = best
        lost1 = merged[8]
    else:
        merged = tl.reduce(
            (top[0], top[1], top[2], top[3], top[4], top[5], top[6], top[7],
             rest[0], rest[1], rest[2], rest[3], rest[4], rest[5], rest[6], rest[7], lost), 1, best_across16
        )  # fmt: skip
        best = (merged[0], merged[1], merged[2], merged[3], merged[4], merged[5], merged[6], merged[7])
        after = (merged[8], merged[9], merged[10], merged[11], merged[12], merged[13], merged[14], merged[15])
        lost1 = merged[16]

    if NARROW:
        found = over_lanes(best, after, lane, WIDTH)
        picked = tl.where(is_selected, MASK - (found & MASK).to(tl.int32), 0)
        x = activate(value_of_narrow(found, MASK), MULTIPLIER, CAP)
    else:
        found = in_columns(best, after, WIDTH)
        place = MASK - (found & MASK).to(tl.int32)
        real = found != 0
        place = tl.where(real, place, 0)
        raw = tl.load(first[:, None] + place)
        b = raw if SELECTION == "logits" else selection_bias(tl.load(bias + place), SELECTION)
        t = selection_score(raw, b, highest[:, None], share[:, None], SELECTION, SCORE, MULTIPLIER, CAP)
        key = tl.where(real, exact_key(t, place), 0)
        if WIDTH == 8:
            s = sort8(split8(tl.reshape(key, [BLOCK_T, 1, 8])))
            r = s
        else:
            low, high = tl.split(tl.permute(tl.reshape(key, [BLOCK_T, 2, 8]), [0, 2, 1]))
            s, r = merge16(
                sort8(split8(tl.reshape(low, [BLOCK_T, 1, 8]))), sort8(split8(tl.reshape(high, [BLOCK_T, 1, 8])))
            )  # fmt: skip
        exact = tl.reshape(in_columns(s, r, WIDTH), [BLOCK_T, WIDTH])
        # Where the K-th of the list and the best left out share the high bits, and low bits were lost, the share of
        # their bucket in the list must be found again; the list stands above the bucket, in exact order.
        kth = (best[K - 1] if K <= 8 else after[K - 9]) | MASK
        lost_bits = tl.reduce(dust, 1, either) & MASK
        members = count_of(((found | MASK) == kth[:, None]) & is_selected)
        unsure = tl.where((kth == (lost1 | MASK)) & (lost_bits != 0), members, 0)
        if tl.max(unsure, axis=0) != 0:
            exact = best_of_bucket(
                exact, kth, K - members, unsure, first, bias, highest, share, lane, STEPS, CHUNKS, BLOCK_T, WIDTH, MASK,
                SELECTION, SCORE, MULTIPLIER, CAP,
            )  # fmt: skip
        picked, x = from_exact(exact, is_selected, first, SELECTION)
        x = activate(x, MULTIPLIER, CAP)
    if WHOLE_ROW and (not SOFTMAX_KEYS and CAP == 0.0):
        highest = tl.max(tl.where(is_selected, x, -FLOAT32_MAX), axis=1)
        total = sum_of_steps(first, highest, POWER, CHUNKS, BLOCK_T, LANES, MULTIPLIER, CAP)
    w = selected_weights(
        x, is_selected, highest, total, SCORE, RENORMALIZE, EPSILON, FLOOR, SCALE, K, BLOCK_T, WIDTH
    )  # fmt: skip
    store_outputs(
        weights, ids, w, picked, row, T, valid, num_valid_tokens, per_expert_scale, expert_map,
        E, K, SHARED, ZERO_EXPERTS, VALID_ON_DEVICE, WIDTH,
    )  # fmt: skip
