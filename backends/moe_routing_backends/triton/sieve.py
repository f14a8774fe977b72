"""The variant for middling and many tokens on GPUs that compare two bfloat16 in one instruction (sm_90): a sieve.

Tile: ``[BLOCK_T, LANES]`` rows; a lane has its share of a row in registers as pairs of bfloat16; other dtypes are rounded to
that, which keeps their order or makes ties. Where selection looks at sigmoid(x) + bias, the pairs hold quick guesses at that,
for one instruction of the special function unit an expert, and the bar is lowered by all that a guess may be off. With few
lanes a row (``TILED``) a program reads rows as they lie in memory, in whole cache lines, and hands the pairs over through
shared memory; otherwise each lane reads chunks of 8 experts. Then:

1. Sorting networks over pairs find a bar that at least K experts are not below. Experts are first put into groups of
   ``GROUP``, and only the highest of each goes through the networks: the bar is the K-th of those.
2. One comparison a pair with the bar leaves a mask of the experts that are not below it: the K, with what ties with the
   last of them after rounding, and with the second of a group here and there, one or two of a row.
3. Those are read again (8 reads from the L1 cache), and their keys sorted by networks. So nothing rests on the rounding, and
   ties, NaN and infinities follow the keys. They come 4 a lane at a time, until no mask of the block has more.

About half of the instructions of ``rows.py``: a comparator of pairs serves two experts, and groups spare most of them. Keys
have 32 bits, as there, but the bar is known by then: what float32 scores have in them is the number of float32 between the
bar and the score, exact as long as the row's best is no more than 4 doublings above the bar at 128 experts, 2 at 256, 1 at
512 (``window``). A block with a row where it is more, and two that matter could be confused, reads its lists again and sorts
exact keys, and where the K-th could be confused with the best left out, it walks over its masks for all that share the high
bits of that key.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_routing_backends.triton.early import wait_for_kernels_in_front
from moe_routing_backends.triton.finish import store_outputs
from moe_routing_backends.triton.keys import (
    FLOAT32_MAX,
    at_least,
    clean,
    narrow_key,
    ordered_bits,
    value_of_narrow,
    value_of_rough,
    with_place,
)
from moe_routing_backends.triton.networks import (
    across8,
    best_across8,
    best_across16,
    insert,
    over_lanes,
    sort4,
    sort8,
)
from moe_routing_backends.triton.pairs import (
    LEAST_PAIR,
    halves,
    index_of_bit,
    low_half,
    margin,
    not_below,
    pair_max,
    pair_min,
    rounded,
    rounded_halves,
    sigmoid_scores,
    swapped,
)
from moe_routing_backends.triton.rows import count_of, exact_key, from_exact, highest_of_row, split8, sum_of_steps
from moe_routing_backends.triton.scores import activate, selected_weights, selection_bias, selection_score

LEAST_BITS = tl.constexpr(0x00800000)
"""``ordered_bits`` of the lowest finite float32."""


@triton.jit
def split4(tile):
    """Split ``[ROWS, LANES, 4]`` into 4 tensors ``[ROWS, LANES]``."""
    ROWS: tl.constexpr = tile.shape[0]
    LANES: tl.constexpr = tile.shape[1]
    even, odd = tl.split(tl.reshape(tile, [ROWS, LANES, 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def load_pairs(first, chunk):
    """Load the 8 logits of ``chunk [ROWS, LANES]`` as 4 pairs; bfloat16 comes as int32 pointers, the rest is rounded."""
    if first.dtype.element_ty == tl.int32:
        return split4(tl.load(first[:, None, None] + (chunk * 4)[:, :, None] + tl.arange(0, 4)[None, None, :]))
    else:
        a, b, c, d, e, f, g, h = load_eight(first[:, None, None], chunk)
        return rounded(a, b), rounded(c, d), rounded(e, f), rounded(g, h)


@triton.jit
def load_eight(first, chunk):
    """Load the 8 logits or biases of ``chunk [ROWS, LANES]`` as float32; bfloat16 may come as int32 pointers."""
    column = tl.arange(0, 4)[None, None, :]
    if first.dtype.element_ty == tl.int32:
        a, b, c, d = split4(tl.load(first + (chunk * 4)[:, :, None] + column))
        return halves(a) + halves(b) + halves(c) + halves(d)
    elif first.dtype.element_ty == tl.float32:
        base = first + (chunk * 8)[:, :, None]
        return split4(tl.load(base + column)) + split4(tl.load(base + 4 + column))
    else:
        return split8(tl.load(first + (chunk * 8)[:, :, None] + tl.arange(0, 8)[None, None, :]).to(tl.float32))


@triton.jit
def guesses(low, high, low_bias, high_bias):
    """Guess the scores of two logits with their biases, as a pair of float16."""
    return sigmoid_scores(low, high, rounded_halves(low_bias + 0.5, high_bias + 0.5))


@triton.jit
def load_scores(first, bias, chunk):
    """Load the 8 logits and biases of ``chunk [ROWS, LANES]`` as 4 pairs of scores."""
    x = load_eight(first[:, None, None], chunk)
    b = load_eight(bias, chunk)
    found = ()
    for i in tl.static_range(0, 8, 2):
        found += (guesses(x[i], x[i + 1], b[i], b[i + 1]),)
    return found


@triton.jit
def split_each(tiles):
    """Split each ``[ROWS, LANES, N]`` into its even and its odd columns: first all even ones, then all odd ones."""
    even = ()
    odd = ()
    for i in tl.static_range(len(tiles)):
        tile = tiles[i]
        a, b = tl.split(tl.reshape(tile, [tile.shape[0], tile.shape[1], tile.shape[2] // 2, 2]))
        even += (a,)
        odd += (b,)
    return even + odd


@triton.jit
def load_tile(first, bias, E: tl.constexpr, LANES: tl.constexpr, SELECTION: tl.constexpr):
    """Load rows as they lie in memory, whole cache lines a warp, and hand them over through shared memory.

    Scores are guessed before that, where a thread has the same experts in every row, and prepares their biases once.

    :returns: the pairs of each lane's share of its row, which lies in one piece.
    """
    ROWS: tl.constexpr = first.shape[0]
    PAIRS: tl.constexpr = E // 2 // LANES
    if first.dtype.element_ty == tl.int32:
        tile = tl.load(first[:, None] + tl.arange(0, E // 2)[None, :])
        if SELECTION != "logits":
            low, high = halves(tile)
    else:
        whole = tl.load(first[:, None] + tl.arange(0, E)[None, :]).to(tl.float32)
        low, high = tl.split(tl.reshape(whole, [ROWS, E // 2, 2]))
        if SELECTION == "logits":
            tile = rounded(low, high)
    if SELECTION != "logits":
        even = tl.load(bias + 2 * tl.arange(0, E // 2)).to(tl.float32)[None, :]
        odd = tl.load(bias + 2 * tl.arange(0, E // 2) + 1).to(tl.float32)[None, :]
        tile = guesses(low, high, even, odd)
    pairs = (tl.reshape(tile, [ROWS, LANES, PAIRS]),)
    for i in tl.static_range(7):
        if 1 << i < PAIRS:
            pairs = split_each(pairs)
    flat = ()
    for i in tl.static_range(PAIRS):
        flat += (tl.reshape(pairs[i], [ROWS, LANES]),)
    return flat


@triton.jit
def kth_of_halves(t, K: tl.constexpr):
    """Return the K-th highest of two descending lists of 8, the halves of ``t``, in both halves; K <= 16.

    The K highest are i of one list and K - i of the other for some i, and the lowest of them is the lower of those two ends;
    for every other i that minimum is no higher.
    """
    found = tl.full(t[0].shape, LEAST_PAIR, tl.int32)
    for i in tl.static_range(0 if K <= 8 else K - 8, K + 1 if K <= 8 else 9):
        if i == 0:
            found = pair_max(found, swapped(t[K - 1]))
        elif i == K:
            found = pair_max(found, t[K - 1])
        else:
            found = pair_max(found, pair_min(t[i - 1], swapped(t[K - i - 1])))
    return found


@triton.jit
def range_of(bar, highest, SELECTION: tl.constexpr):
    """Return bounds, as ``ordered_bits``, of the K-th highest and of the highest score, and the bar to hold pairs to.

    :param bar, highest: pairs ``[ROWS]`` with the K-th highest or less, the same in both halves, and with the highest. NaN
        among the pairs, a NaN logit or bias, is no score above the highest.
    """
    highest = pair_max(highest, swapped(highest))
    if SELECTION == "logits":
        # Rounding to bfloat16 moves a float32 by at most half of 2**16 floats.
        low, _ = halves(bar)
        high, _ = halves(highest)
        least = tl.maximum(ordered_bits(low, False) - 0x8000, LEAST_BITS)
        return least, ordered_bits(high, False) + 0x8000, bar
    else:
        low, high = low_half(bar), low_half(highest)
        low -= margin(low)
        high += margin(high)
        # Neither is a number where there are not K scores that float16 has; then nothing is below the bar, NaN.
        least = tl.where(low >= -FLOAT32_MAX, ordered_bits(low, False), LEAST_BITS)
        most = tl.where(high <= FLOAT32_MAX, ordered_bits(high, False), 0xFF7FFFFF)
        return least, most, rounded_halves(low, low)


@triton.jit
def window(least, most, MASK: tl.constexpr):
    """Return the factor and the offset that ``window_key`` needs for scores between bounds, and the float32 before the least.

    The factor is ``MASK + 1`` where a key has room for all that lies between, and half as much for each bit too many.
    """
    ROOM: tl.constexpr = 2**32 // (MASK + 1)
    bits_lost = tl.maximum(index_of_bit((most - least + 2 * MASK + 2) // ROOM) + 1, 0)
    factor = tl.full(least.shape, MASK + 1, tl.uint32) >> bits_lost.to(tl.uint32)
    return factor, MASK + 1 - least * factor, at_least(value_of_rough(least - 1), -FLOAT32_MAX)


@triton.jit
def window_key(t, place, factor, offset, MASK: tl.constexpr, SELECTION: tl.constexpr):
    """Pack how many float32 a score is above the least, or above what is before it, and the complement of its place.

    A 16-bit logit needs no window.
    """
    if t.dtype != tl.float32:
        return narrow_key(t, place, MASK)
    else:
        return with_place(ordered_bits(t, SELECTION == "logits") * factor + offset, place, MASK)


@triton.jit
def take(masks, bases):
    """Take the lowest bit out of the first mask that is not empty: whether there was one, its place, what is left."""
    LAST: tl.constexpr = len(masks) - 1
    mask = masks[LAST]
    base = bases[LAST]
    for i in tl.static_range(1, LAST + 1):
        full = masks[LAST - i] != 0
        mask = tl.where(full, masks[LAST - i], mask)
        base = tl.where(full, bases[LAST - i], base)
    rest = mask & (mask - 1)
    left = ()
    none_before = tl.full(mask.shape, 1, tl.int1)
    for i in tl.static_range(LAST):
        full = masks[i] != 0
        left += (tl.where(none_before & full, rest, masks[i]),)
        none_before &= ~full
    left += (tl.where(none_before, rest, masks[LAST]),)
    return mask != 0, base, index_of_bit(mask ^ rest), left


@triton.jit
def score_at(place, first, bias, floor, SELECTION: tl.constexpr, SCORE: tl.constexpr):
    """Load what selection looks at for the experts ``place [ROWS, N]``: a 16-bit logit as it is, or a finite float32.

    :param floor: what NaN and all that is lower counts as; nothing that is selected is so low, unless it is -FLOAT32_MAX.
    """
    raw = tl.load(first[:, None] + place)
    if SELECTION != "logits":
        b = selection_bias(tl.load(bias + place), SELECTION)
        return tl.maximum(selection_score(raw, b, None, None, SELECTION, SCORE, 1.0, 0.0), floor)
    elif raw.dtype == tl.float32:
        return tl.minimum(at_least(raw, floor), FLOAT32_MAX)
    else:
        return raw


@triton.jit
def candidate(masks, bases, first, bias, floor, GAP: tl.constexpr, SELECTION: tl.constexpr, SCORE: tl.constexpr):
    """Take one expert out of the masks: whether there was one, its place, its ``score_at``, and the masks left.

    Bit 16 h + p stands for half h of a lane's p-th pair; after 4 pairs, a chunk, there are 4 times ``GAP`` experts of others.
    """
    some, base, bit, masks = take(masks, bases)
    place = base + 2 * bit - 31 * (bit >> 4) + (bit & 12) * GAP
    place = tl.where(some, place, 0)
    return some, place, score_at(place, first, bias, floor, SELECTION, SCORE), masks


@triton.jit
def batch(
    masks, bases, first, bias, floor, factor, offset, GAP: tl.constexpr, MASK: tl.constexpr, SELECTION: tl.constexpr,
    SCORE: tl.constexpr,
):  # fmt: skip
    """Take up to 4 experts out of the masks: their keys, highest first and filled up to 8, and what is left."""
    keys = ()
    for _ in tl.static_range(4):
        some, place, t, masks = candidate(masks, bases, first, bias, floor, GAP, SELECTION, SCORE)
        keys += (tl.where(some, window_key(t, place, factor, offset, MASK, SELECTION), 0),)
    nothing = keys[0] * 0
    return sort4(keys) + (nothing, nothing, nothing, nothing), masks


@triton.jit
def in_exact_order(
    found, first, bias, MASK: tl.constexpr, K: tl.constexpr, SELECTION: tl.constexpr, SCORE: tl.constexpr
):  # fmt: skip
    """Return the exact keys of the K highest of a list of window keys, ``found [ROWS, WIDTH]``, highest first."""
    column = tl.arange(0, found.shape[1])[None, :]
    place = tl.where(found != 0, MASK - (found & MASK).to(tl.int32), 0)
    left = tl.where(found != 0, exact_key(score_at(place, first, bias, -FLOAT32_MAX, SELECTION, SCORE), place), 0)
    ordered = tl.zeros(found.shape, tl.uint64)
    rounds = tl.minimum(tl.max(count_of(found != 0), axis=0), K)  # K, but not to the compiler: it would unroll the loop
    for k in range(rounds):
        best = tl.max(left, axis=1)[:, None]
        ordered = tl.where(column == k, best, ordered)
        left = tl.where(left == best, 0, left)
    return ordered


@triton.jit
def best_of_bucket(
    exact, bucket, first_column, count, masks, bases, first, bias, floor, factor, offset, GAP: tl.constexpr,
    MASK: tl.constexpr, SELECTION: tl.constexpr, SCORE: tl.constexpr,
):  # fmt: skip
    """Fill ``count`` columns of ``exact`` from ``first_column`` on with the best exact keys of a bucket, a walk a key.

    A bucket is the experts in the masks whose window keys share the high bits, ``bucket [ROWS]``. Slow, and rarely needed.
    """
    column = tl.arange(0, exact.shape[1])[None, :]
    last = tl.zeros(bucket.shape, tl.uint64) - 1
    rounds = tl.max(count, axis=0)
    k = 0
    while k < rounds:
        best = tl.zeros(masks[0].shape, tl.uint64)
        left = masks
        more = any_left(left)
        while more != 0:
            some, place, t, left = candidate(left, bases, first, bias, floor, GAP, SELECTION, SCORE)
            key = exact_key(t, place)
            alike = (window_key(t, place, factor, offset, MASK, SELECTION) | MASK) == bucket[:, None]
            inside = some & alike & (key < last[:, None])
            best = tl.maximum(best, tl.where(inside, key, 0))
            more = any_left(left)
        last = tl.max(best, axis=1)
        exact = tl.where((column == (first_column + k)[:, None]) & (k < count)[:, None], last[:, None], exact)
        k += 1
    return exact


@triton.jit
def any_left(masks):
    """Tell whether any row of the block has experts left."""
    left = masks[0]
    for i in tl.static_range(1, len(masks)):
        left |= masks[i]
    return any_of(left != 0)


@triton.jit
def any_of(chosen):
    """Tell whether any of ``chosen [ROWS, LANES]`` is true."""
    return tl.max(tl.reshape(chosen.to(tl.int32), [chosen.shape[0] * chosen.shape[1]]), axis=0)


@triton.jit
def best_of(
    masks, bases, first, bias, floor, factor, offset, GAP: tl.constexpr, MASK: tl.constexpr, WIDTH: tl.constexpr,
    SELECTION: tl.constexpr, SCORE: tl.constexpr,
):  # fmt: skip
    """Sort the experts in the masks: the ``WIDTH`` highest keys of each row, and the highest left out."""
    top, masks = batch(masks, bases, first, bias, floor, factor, offset, GAP, MASK, SELECTION, SCORE)
    nothing = top[0] * 0
    lost = nothing
    rest = (nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing)
    more = any_left(masks)
    while more != 0:
        s, masks = batch(masks, bases, first, bias, floor, factor, offset, GAP, MASK, SELECTION, SCORE)
        top, rest, lost = insert(top, rest, lost, s, WIDTH)
        more = any_left(masks)
    if WIDTH == 8:
        both = tl.reduce(top + (lost,), 1, best_across8)
        return both[:8], (), both[8]
    else:
        both = tl.reduce(top + rest + (lost,), 1, best_across16)
        return both[:8], both[8:16], both[16]


@triton.jit(do_not_specialize=["T", "valid", "row_stride", "expert_stride", "per_expert_scale", "bias", "token_ids",
                               "expert_table", "num_valid_tokens", "expert_map", "vocabulary"])  # fmt: skip
def sieve_kernel(
    logits, weights, ids, per_expert_scale, bias, token_ids, expert_table, num_valid_tokens, expert_map,
    T: tl.int32, valid: tl.int32, row_stride: tl.int64, expert_stride: tl.int64, vocabulary: tl.int32,
    E: tl.constexpr, K: tl.constexpr, SHARED: tl.constexpr, ROW_STRIDE: tl.constexpr, EXPERT_STRIDE: tl.constexpr,
    SCORE: tl.constexpr, SELECTION: tl.constexpr, RENORMALIZE: tl.constexpr, EPSILON: tl.constexpr, FLOOR: tl.constexpr,
    SCALE: tl.constexpr, MULTIPLIER: tl.constexpr, CAP: tl.constexpr, ZERO_EXPERTS: tl.constexpr,
    VALID_ON_DEVICE: tl.constexpr, EARLY: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
    TILED: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Route ``BLOCK_T`` rows by ``LANES`` threads each, which divide E / 8; ``GROUP`` divides the pairs of a thread."""
    wait_for_kernels_in_front(EARLY)
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    readable = tl.minimum(row, T - 1).to(tl.int64)
    if ROW_STRIDE:
        offset = readable * ROW_STRIDE
    else:
        offset = tl.multiple_of(readable * row_stride, 4)
    first = logits + offset
    STEPS: tl.constexpr = E // 8 // LANES
    PAIRS: tl.constexpr = STEPS * 4
    MASK: tl.constexpr = triton.next_power_of_2(E) - 1
    EXACT: tl.constexpr = RENORMALIZE and EPSILON == 0.0 and FLOOR == 0.0
    GAP: tl.constexpr = 0 if TILED else 2 * LANES - 2
    lane = tl.arange(0, LANES)[None, :] + tl.zeros([BLOCK_T, 1], tl.int32)
    if logits.dtype.element_ty == tl.bfloat16:
        source = first.to(tl.pointer_type(tl.int32), bitcast=True)
    else:
        source = first

    if TILED:
        pairs = load_tile(source, bias, E, LANES, SELECTION)
    else:
        pairs = ()
        for i in tl.static_range(STEPS):
            if SELECTION == "logits":
                pairs += load_pairs(source, lane + i * LANES)
            else:
                pairs += load_scores(source, bias, lane + i * LANES)
    GROUPS: tl.constexpr = PAIRS // GROUP
    least = tl.full(lane.shape, LEAST_PAIR, tl.int32)
    groups = ()
    for i in tl.static_range(GROUPS):
        most = least
        for j in tl.static_range(GROUP):
            most = pair_max(most, pairs[i + j * GROUPS])
        groups += (most,)
    for _ in tl.static_range(-GROUPS % 8):
        groups += (least,)
    best = sort8(groups[:8])
    for i in tl.static_range(1, (GROUPS + 7) // 8):
        best = across8(*best, *sort8(groups[8 * i : 8 * i + 8]))
    best = tl.reduce(best, 1, across8)
    bar = kth_of_halves(best, K)
    NARROW: tl.constexpr = SELECTION == "logits" and logits.dtype.element_ty != tl.float32
    if NARROW:
        factor = None
        offset = None
        floor = None
    else:
        least, most, bar = range_of(bar, best[0], SELECTION)
        factor, offset, floor = window(least, most, MASK)
        factor, offset, floor = factor[:, None], offset[:, None], floor[:, None]
    bar = bar[:, None]

    masks = ()
    bases = ()
    for i in tl.static_range((PAIRS + 15) // 16):
        mask = tl.zeros(lane.shape, tl.uint32)
        for j in tl.static_range(16 if 16 * i + 16 <= PAIRS else PAIRS % 16):
            mask |= not_below(pairs[16 * i + j], bar, 0x00010001 << j)
        masks += (mask,)
        bases += (lane * (2 * PAIRS if TILED else 8) + i * (32 if TILED else 32 * LANES),)

    column = tl.arange(0, WIDTH)
    is_selected = (column < K)[None, :]
    top, rest, lost = best_of(
        masks, bases, first, bias, floor, factor, offset, GAP, MASK, WIDTH, SELECTION, SCORE
    )  # fmt: skip
    found = over_lanes(top, rest, lane, WIDTH)
    picked = tl.where(is_selected, MASK - (found & MASK).to(tl.int32), 0)
    if NARROW:
        x = value_of_narrow(found, MASK)
    else:
        x = clean(tl.load(first[:, None] + picked))
        is_lossy = factor + lane.to(tl.uint32) * 0 != MASK + 1  # over all lanes: else the compiler does all above twice
        if any_of(is_lossy) != 0:
            # The list may misorder where two neighbours, down to the best left out, share all bits but the place's.
            every = top + rest + (lost,)
            closest = every[0] ^ every[1]
            for i in tl.static_range(1, K):
                closest = tl.minimum(closest, every[i] ^ every[i + 1])
            unsure = (closest[:, None] <= MASK) & is_lossy
            if any_of(unsure) != 0:
                exact = in_exact_order(found, first, bias, MASK, K, SELECTION, SCORE)
                # The list lacks experts that belong into it only where the K-th and the best left out are hard to tell apart.
                kth = every[K - 1] | MASK
                members = count_of(((found | MASK) == kth[:, None]) & is_selected)
                missing = tl.where(kth == (lost | MASK), members, 0)
                exact = best_of_bucket(
                    exact, kth, K - members, missing, masks, bases, first, bias, floor, factor, offset, GAP, MASK,
                    SELECTION, SCORE,
                )  # fmt: skip
                picked, x = from_exact(exact, is_selected, first, SELECTION)
    x = activate(x, MULTIPLIER, CAP)
    highest = tl.zeros([BLOCK_T], tl.float32)
    total = highest
    if SCORE == "softmax" and not EXACT:
        if CAP != 0.0:
            highest = highest_of_row(first, STEPS, E // 8, BLOCK_T, LANES, MULTIPLIER, CAP)
        else:
            highest = tl.max(tl.where(is_selected, x, -FLOAT32_MAX), axis=1)
        STEPS_2: tl.constexpr = triton.next_power_of_2(STEPS)
        total = sum_of_steps(first, highest, STEPS_2, E // 8, BLOCK_T, LANES, MULTIPLIER, CAP)
    w = selected_weights(
        x, is_selected, highest, total, SCORE, RENORMALIZE, EPSILON, FLOOR, SCALE, K, BLOCK_T, WIDTH
    )  # fmt: skip
    store_outputs(
        weights, ids, w, picked, row, T, valid, num_valid_tokens, per_expert_scale, expert_map,
        E, K, SHARED, ZERO_EXPERTS, VALID_ON_DEVICE, WIDTH,
    )  # fmt: skip
