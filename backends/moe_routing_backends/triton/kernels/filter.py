"""Filter kernel, for many tokens on GPUs that compare two bfloat16 in one instruction (sm_90).

It finds the top k in two passes.

Tile: ``[BLOCK_T, THREADS_PER_ROW]`` threads. A thread holds its share of a row in registers as
pairs of bfloat16. Other dtypes are rounded to bfloat16, which keeps their order or makes ties.
Where selection uses sigmoid(x) + bias, the pairs hold approximate scores, one instruction of the
special function unit for two experts, and the threshold is lowered by the largest error of an
approximation. With few threads a row (``TILED``) a program reads rows as they lie in memory, in
whole cache lines, and hands the pairs over through shared memory. Otherwise each thread reads
chunks of 8 experts.

1. First pass: sorting networks over pairs find a threshold that at least K experts reach. Experts
   are put into groups of ``GROUP``, and only the highest of each group enters the networks: the
   threshold is the K-th of those.
2. One comparison of each pair with the threshold leaves a bit mask of the experts that reach it:
   the K, what ties with the last of them after rounding, and sometimes the second of a group. That
   is one or two more experts a row.
3. Second pass: those experts are read again (about 8 reads from the L1 cache), and networks sort
   their keys. Nothing rests on the rounding, and ties, NaN and infinities follow the keys. A thread
   takes 4 experts at a time, until no mask of the block has any left.

Cost: about half of the instructions of ``thread_per_row``. A comparator of pairs serves two
experts, and grouping avoids most comparators. Keys have 32 bits, as there, but the threshold is
known by then. The key of a float32 score is the number of float32 values between the threshold and
the score: exact if the best of the row is at most 4 doublings above the threshold at 128 experts, 2
at 256, 1 at 512 (``window``). If a row of the block exceeds that, and two experts that matter could
be confused, the block reads its lists again and sorts exact keys. If the K-th could be confused
with the best expert left out, it walks over its masks for all experts that share the high bits of
that key.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from moe_routing_backends.triton.device.bf16x2 import (
    LOWEST_BF16X2,
    index_of_bit,
    low_f16,
    margin,
    mask_not_below,
    max_bf16x2,
    min_bf16x2,
    round_to_bf16x2,
    round_to_f16x2,
    sigmoid_scores,
    swap_halves,
    unpack_bf16x2,
)
from moe_routing_backends.triton.device.chunks import (
    count_of,
    exact_key,
    from_exact,
    highest_of_row,
    split8,
    sum_of_steps,
)
from moe_routing_backends.triton.device.epilogue import count_slots, store_outputs
from moe_routing_backends.triton.device.keys import (
    FLOAT32_MAX,
    at_least,
    clean,
    exact16_key,
    ordered_bits,
    value_of_exact16,
    value_of_truncated,
    with_index,
)
from moe_routing_backends.triton.device.pdl import grid_dependency_wait, launch_dependents
from moe_routing_backends.triton.device.scores import (
    activate,
    selected_weights,
    selection_bias,
    selection_score,
)
from moe_routing_backends.triton.device.sorting_networks import (
    across8,
    insert,
    merge_lists,
    over_threads,
    sort4,
    sort8,
)
from moe_routing_backends.triton.kernels import thread_per_row
from moe_routing_backends.triton.kernels.spec import (
    CHUNK,
    NOT_SPECIALIZED,
    Variant,
    kind,
    list_width,
    next_power_of_two,
    one_warp,
)

if TYPE_CHECKING:
    from moe_routing_backends.triton.kernels.spec import Launch
    from moe_routing_registry import DeviceInfo, RoutingProblem

LEAST_BITS = tl.constexpr(0x00800000)
"""``ordered_bits`` of the lowest finite float32."""
FROM_CAPABILITY = (9, 0)
"""Least compute capability on which the variant was measured.

Nothing is derived for older devices.
"""
MOST_CHUNKS = 16
"""Chunks of a row that one thread keeps in registers."""
MOST_TILED = 4
"""Threads a row up to which rows are read as they lie in memory.

With 8 the exchange costs more than it saves.
"""
LEAST_GROUPS = 8
"""Experts are grouped as long as there are so many groups for each expert that is selected."""


@triton.jit
def split4(tile):
    """Split ``[ROWS, THREADS_PER_ROW, 4]`` into 4 tensors ``[ROWS, THREADS_PER_ROW]``."""
    ROWS: tl.constexpr = tile.shape[0]
    THREADS_PER_ROW: tl.constexpr = tile.shape[1]
    # As `chunks.split8`, of 4 columns.
    even, odd = tl.split(tl.reshape(tile, [ROWS, THREADS_PER_ROW, 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def load_pairs(first, chunk):
    """Load the 8 logits of ``chunk [ROWS, THREADS_PER_ROW]`` as 4 pairs.

    Bfloat16 comes as int32 pointers, the rest is rounded.
    """
    if first.dtype.element_ty == tl.int32:
        return split4(
            tl.load(first[:, None, None] + (chunk * 4)[:, :, None] + tl.arange(0, 4)[None, None, :])
        )
    else:
        a, b, c, d, e, f, g, h = load_eight(first[:, None, None], chunk)
        return (
            round_to_bf16x2(a, b),
            round_to_bf16x2(c, d),
            round_to_bf16x2(e, f),
            round_to_bf16x2(g, h),
        )


@triton.jit
def load_eight(first, chunk):
    """Load the 8 logits or biases of ``chunk [ROWS, THREADS_PER_ROW]`` as float32.

    Bfloat16 may come as int32 pointers.
    """
    column = tl.arange(0, 4)[None, None, :]
    if first.dtype.element_ty == tl.int32:
        a, b, c, d = split4(tl.load(first + (chunk * 4)[:, :, None] + column))
        return unpack_bf16x2(a) + unpack_bf16x2(b) + unpack_bf16x2(c) + unpack_bf16x2(d)
    elif first.dtype.element_ty == tl.float32:
        base = first + (chunk * 8)[:, :, None]
        return split4(tl.load(base + column)) + split4(tl.load(base + 4 + column))
    else:
        return split8(
            tl.load(first + (chunk * 8)[:, :, None] + tl.arange(0, 8)[None, None, :]).to(tl.float32)
        )


@triton.jit
def approximate_scores(low, high, low_bias, high_bias):
    """Guess the scores of two logits with their biases, as a pair of float16."""
    return sigmoid_scores(low, high, round_to_f16x2(low_bias + 0.5, high_bias + 0.5))


@triton.jit
def load_scores(first, bias, chunk):
    """Load the 8 logits and biases of ``chunk [ROWS, THREADS_PER_ROW]`` as 4 pairs of scores."""
    x = load_eight(first[:, None, None], chunk)
    b = load_eight(bias, chunk)
    found = ()
    for i in tl.static_range(0, 8, 2):
        found += (approximate_scores(x[i], x[i + 1], b[i], b[i + 1]),)
    return found


@triton.jit
def split_each(tiles):
    """Split each ``[ROWS, THREADS_PER_ROW, N]`` into its even and its odd columns.

    First all even ones, then all odd ones.
    """
    even = ()
    odd = ()
    for i in tl.static_range(len(tiles)):
        tile = tiles[i]
        # One bit of the column a round, so that after all rounds each tensor holds one column.
        a, b = tl.split(tl.reshape(tile, [tile.shape[0], tile.shape[1], tile.shape[2] // 2, 2]))
        even += (a,)
        odd += (b,)
    return even + odd


@triton.jit
def load_tile(first, bias, THREADS_PER_ROW: tl.constexpr, SPEC: tl.constexpr):
    """Load whole rows, and hand each thread its share through shared memory.

    A warp reads whole cache lines. Scores are guessed before the threads hand them over, where a
    thread has the same experts in every row, and prepares their biases once.

    :returns: the pairs of each thread's share of its row, which lies in one piece.
    """
    E: tl.constexpr = SPEC.value.num_experts
    SELECTION: tl.constexpr = SPEC.value.selection
    ROWS: tl.constexpr = first.shape[0]
    PAIRS: tl.constexpr = E // 2 // THREADS_PER_ROW
    if first.dtype.element_ty == tl.int32:
        tile = tl.load(first[:, None] + tl.arange(0, E // 2)[None, :])
        if SELECTION != "logits":
            low, high = unpack_bf16x2(tile)
    else:
        whole = tl.load(first[:, None] + tl.arange(0, E)[None, :]).to(tl.float32)
        # Neighbours share a pair, as two bfloat16 in memory share 32 bits.
        low, high = tl.split(tl.reshape(whole, [ROWS, E // 2, 2]))
        if SELECTION == "logits":
            tile = round_to_bf16x2(low, high)
    if SELECTION != "logits":
        even = tl.load(bias + 2 * tl.arange(0, E // 2)).to(tl.float32)[None, :]
        odd = tl.load(bias + 2 * tl.arange(0, E // 2) + 1).to(tl.float32)[None, :]
        tile = approximate_scores(low, high, even, odd)
    # A thread gets a contiguous share of its row: here the pairs go through shared memory.
    pairs = (tl.reshape(tile, [ROWS, THREADS_PER_ROW, PAIRS]),)
    for i in tl.static_range(7):
        if 1 << i < PAIRS:
            pairs = split_each(pairs)
    flat = ()
    for i in tl.static_range(PAIRS):
        flat += (tl.reshape(pairs[i], [ROWS, THREADS_PER_ROW]),)
    return flat


@triton.jit
def kth_of_halves(t, K: tl.constexpr):
    """Return the K-th highest of two descending lists of 8, the halves of ``t``, in both halves.

    K is at most 16. The K highest are i of one list and K - i of the other for some i, and the
    lowest of them is the lower of those two ends; for every other i that minimum is no higher.
    """
    found = tl.full(t[0].shape, LOWEST_BF16X2, tl.int32)
    for i in tl.static_range(0 if K <= 8 else K - 8, K + 1 if K <= 8 else 9):
        if i == 0:
            found = max_bf16x2(found, swap_halves(t[K - 1]))
        elif i == K:
            found = max_bf16x2(found, t[K - 1])
        else:
            found = max_bf16x2(found, min_bf16x2(t[i - 1], swap_halves(t[K - i - 1])))
    return found


@triton.jit
def range_of(threshold, highest, SPEC: tl.constexpr):
    """Return bounds of the K-th highest and of the highest score, and the threshold for pairs.

    Bounds are ``ordered_bits``.

    :param threshold, highest: pairs ``[ROWS]`` with the K-th highest or less, the same in both
        halves, and with the highest. NaN among the pairs, a NaN logit or bias, is no score above
        the highest.
    """
    SELECTION: tl.constexpr = SPEC.value.selection
    highest = max_bf16x2(highest, swap_halves(highest))
    if SELECTION == "logits":
        # Rounding to bfloat16 moves a float32 by at most half of 2**16 floats.
        low, _ = unpack_bf16x2(threshold)
        high, _ = unpack_bf16x2(highest)
        least = tl.maximum(ordered_bits(low, False) - 0x8000, LEAST_BITS)
        return least, ordered_bits(high, False) + 0x8000, threshold
    else:
        low, high = low_f16(threshold), low_f16(highest)
        low -= margin(low)
        high += margin(high)
        # Neither is a number where there are not K scores that float16 has; then nothing is below
        # the threshold, NaN.
        least = tl.where(low >= -FLOAT32_MAX, ordered_bits(low, False), LEAST_BITS)
        most = tl.where(high <= FLOAT32_MAX, ordered_bits(high, False), 0xFF7FFFFF)
        return least, most, round_to_f16x2(low, low)


@triton.jit
def window(least, most, MASK: tl.constexpr):
    """Return what ``window_key`` needs for scores between bounds: factor, offset and floor.

    The floor is the float32 before the least score. The factor is ``MASK + 1`` where a key has room
    for all that lies between, and half as much for each bit too many.
    """
    ROOM: tl.constexpr = 2**32 // (MASK + 1)
    bits_lost = tl.maximum(index_of_bit((most - least + 2 * MASK + 2) // ROOM) + 1, 0)
    factor = tl.full(least.shape, MASK + 1, tl.uint32) >> bits_lost.to(tl.uint32)
    return factor, MASK + 1 - least * factor, at_least(value_of_truncated(least - 1), -FLOAT32_MAX)


@triton.jit
def window_key(t, index, factor, offset, MASK: tl.constexpr, SPEC: tl.constexpr):
    """Pack how many float32 a score is above the floor, and the complement of its index.

    A 16-bit logit needs no window.
    """
    if t.dtype != tl.float32:
        return exact16_key(t, index, MASK)
    else:
        SELECTION: tl.constexpr = SPEC.value.selection
        return with_index(ordered_bits(t, SELECTION == "logits") * factor + offset, index, MASK)


@triton.jit
def take(masks, bases):
    """Take the lowest bit out of the first mask that is not empty.

    Return whether there was one, its base and its index, and the masks that are left.
    """
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
def score_at(index, first, bias, floor, SPEC: tl.constexpr):
    """Load what selection looks at for the experts ``index [ROWS, N]``.

    That is a 16-bit logit as it is, or a finite float32.

    :param floor: what NaN and all that is lower counts as; nothing that is selected is so low,
        unless it is -FLOAT32_MAX.
    """
    SELECTION: tl.constexpr = SPEC.value.selection
    raw = tl.load(first[:, None] + index)
    if SELECTION != "logits":
        b = selection_bias(tl.load(bias + index), SPEC)
        return tl.maximum(selection_score(raw, b, None, None, SPEC), floor)
    elif raw.dtype == tl.float32:
        return tl.minimum(at_least(raw, floor), FLOAT32_MAX)
    else:
        return raw


@triton.jit
def candidate(masks, bases, first, bias, floor, GAP: tl.constexpr, SPEC: tl.constexpr):
    """Take one expert out of the masks.

    Return whether there was one, its index, its ``score_at``, and the masks that are left.

    Bit 16 h + p stands for half h of a thread's p-th pair; after 4 pairs, a chunk, there are 4
    times ``GAP`` experts of others.
    """
    some, base, bit, masks = take(masks, bases)
    index = base + 2 * bit - 31 * (bit >> 4) + (bit & 12) * GAP
    index = tl.where(some, index, 0)
    return some, index, score_at(index, first, bias, floor, SPEC), masks


@triton.jit
def batch(
    masks, bases, first, bias, floor, factor, offset,
    GAP: tl.constexpr, MASK: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Take up to 4 experts out of the masks.

    Return their keys, highest first and filled up to 8, and the masks that are left.
    """
    keys = ()
    for _ in tl.static_range(4):
        some, index, t, masks = candidate(masks, bases, first, bias, floor, GAP, SPEC)
        keys += (tl.where(some, window_key(t, index, factor, offset, MASK, SPEC), 0),)
    nothing = keys[0] * 0
    return sort4(keys) + (nothing, nothing, nothing, nothing), masks


@triton.jit
def in_exact_order(found, first, bias, MASK: tl.constexpr, SPEC: tl.constexpr):
    """Return the exact keys of the K highest window keys in ``found [ROWS, WIDTH]``, in order."""
    K: tl.constexpr = SPEC.value.topk
    column = tl.arange(0, found.shape[1])[None, :]
    index = tl.where(found != 0, MASK - (found & MASK).to(tl.int32), 0)
    key = exact_key(score_at(index, first, bias, -FLOAT32_MAX, SPEC), index)
    left = tl.where(found != 0, key, 0)
    ordered = tl.zeros(found.shape, tl.uint64)
    # K, but not to the compiler: it would unroll the loop.
    rounds = tl.minimum(tl.max(count_of(found != 0), axis=0), K)
    for k in range(rounds):
        best = tl.max(left, axis=1)[:, None]
        ordered = tl.where(column == k, best, ordered)
        left = tl.where(left == best, 0, left)
    return ordered


@triton.jit
def best_of_bucket(
    exact, bucket, first_column, count, masks, bases, first, bias, floor, factor, offset,
    GAP: tl.constexpr, MASK: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Fill ``count`` columns of ``exact`` with the best exact keys of a bucket, one walk a key.

    The columns are those from ``first_column`` on. A bucket is the experts in the masks whose
    window keys share the high bits, ``bucket [ROWS]``. Each key takes a walk through the masks,
    which is slow, and rarely needed.
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
            some, index, t, left = candidate(left, bases, first, bias, floor, GAP, SPEC)
            key = exact_key(t, index)
            alike = (window_key(t, index, factor, offset, MASK, SPEC) | MASK) == bucket[:, None]
            inside = some & alike & (key < last[:, None])
            best = tl.maximum(best, tl.where(inside, key, 0))
            more = any_left(left)
        last = tl.max(best, axis=1)
        exact = tl.where(
            (column == (first_column + k)[:, None]) & (k < count)[:, None], last[:, None], exact
        )
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
    """Tell whether any of ``chosen [ROWS, THREADS_PER_ROW]`` is true."""
    # One reduction over all elements, in place of two.
    return tl.max(tl.reshape(chosen.to(tl.int32), [chosen.shape[0] * chosen.shape[1]]), axis=0)


@triton.jit
def best_of(
    masks, bases, first, bias, floor, factor, offset, GAP: tl.constexpr, MASK: tl.constexpr,
    WIDTH: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Sort the experts in the masks.

    Return the ``WIDTH`` highest keys of each row, and the highest key that is left out.
    """
    top, masks = batch(masks, bases, first, bias, floor, factor, offset, GAP, MASK, SPEC)
    nothing = top[0] * 0
    lost = nothing
    rest = (nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing)
    more = any_left(masks)
    while more != 0:
        s, masks = batch(masks, bases, first, bias, floor, factor, offset, GAP, MASK, SPEC)
        top, rest, lost = insert(top, rest, lost, s, WIDTH)
        more = any_left(masks)
    return merge_lists(top, rest, lost, 1, WIDTH)


@triton.jit
def threshold_of(pairs, GROUP: tl.constexpr, K: tl.constexpr):
    """Return a threshold that at least K experts of a row reach, and the highest pair.

    Both are ``[ROWS]``; the threshold is in both halves.

    :param pairs: the pairs of each thread, a tuple of ``[ROWS, THREADS_PER_ROW]``.
    """
    GROUPS: tl.constexpr = len(pairs) // GROUP
    lowest = tl.full(pairs[0].shape, LOWEST_BF16X2, tl.int32)
    groups = ()
    for i in tl.static_range(GROUPS):
        highest = lowest
        for j in tl.static_range(GROUP):
            highest = max_bf16x2(highest, pairs[i + j * GROUPS])
        groups += (highest,)
    for _ in tl.static_range(-GROUPS % 8):  # the networks sort lists of 8
        groups += (lowest,)
    best = sort8(groups[:8])
    for i in tl.static_range(1, (GROUPS + 7) // 8):
        best = across8(*best, *sort8(groups[8 * i : 8 * i + 8]))
    of_row = tl.reduce(best, 1, across8)
    return kth_of_halves(of_row, K), of_row[0]


@triton.jit
def masks_of(pairs, threshold, thread, TILED: tl.constexpr):
    """Return bit masks of the experts that reach the threshold, and each mask's first expert.

    A mask has 16 pairs. Bit 16 h + p of a mask stands for half h of its pair p. A thread's pairs
    lie in one piece if ``TILED``, else in chunks.
    """
    PAIRS: tl.constexpr = len(pairs)
    THREADS_PER_ROW: tl.constexpr = thread.shape[1]
    masks = ()
    bases = ()
    for i in tl.static_range((PAIRS + 15) // 16):
        mask = tl.zeros(thread.shape, tl.uint32)
        for j in tl.static_range(16 if 16 * i + 16 <= PAIRS else PAIRS % 16):
            mask |= mask_not_below(pairs[16 * i + j], threshold[:, None], 0x00010001 << j)
        masks += (mask,)
        base = thread * (2 * PAIRS if TILED else 8) + i * (32 if TILED else 32 * THREADS_PER_ROW)
        bases += (base,)
    return masks, bases


@triton.jit
def is_ambiguous(every, is_lossy, MASK: tl.constexpr, K: tl.constexpr):
    """Tell where two neighbours of a list may be in the wrong order.

    They share all bits but the index's, and bits were lost. The last pair is the best left out.

    :param every: the list and the highest key that it left out, a tuple of ``[ROWS]``.
    """
    closest = every[0] ^ every[1]
    for i in tl.static_range(1, K):
        closest = tl.minimum(closest, every[i] ^ every[i + 1])
    return (closest[:, None] <= MASK) & is_lossy


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def moe_routing_filter(
    logits, weights, ids, per_expert_scale, bias, token_ids, expert_table, num_valid_tokens,
    expert_map, counts, replica_count, most_replicas, T: tl.int32, valid: tl.int32,
    row_stride: tl.int64, expert_stride: tl.int64, vocabulary: tl.int32, SPEC: tl.constexpr,
    ROW_STRIDE: tl.constexpr, EXPERT_STRIDE: tl.constexpr, VALID_ON_DEVICE: tl.constexpr,
    PDL: tl.constexpr, WIDTH: tl.constexpr, THREADS_PER_ROW: tl.constexpr, GROUP: tl.constexpr,
    TILED: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Route ``BLOCK_T`` rows by ``THREADS_PER_ROW`` threads each, which divide E / 8.

    ``GROUP`` divides the pairs of a thread.
    """
    E: tl.constexpr = SPEC.value.num_experts
    K: tl.constexpr = SPEC.value.topk
    SCORE: tl.constexpr = SPEC.value.score
    SELECTION: tl.constexpr = SPEC.value.selection
    CAP: tl.constexpr = SPEC.value.logit_softcap
    SCALE: tl.constexpr = SPEC.value.scale
    SUMS_TO_ONE: tl.constexpr = SPEC.value.sums_to_one
    grid_dependency_wait(PDL)
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    readable = tl.minimum(row, T - 1).to(tl.int64)
    if ROW_STRIDE:
        first = logits + readable * ROW_STRIDE
    else:
        # The launcher has checked 16 bytes.
        first = logits + tl.multiple_of(readable * row_stride, 4)
    STEPS: tl.constexpr = E // 8 // THREADS_PER_ROW
    MASK: tl.constexpr = triton.next_power_of_2(E) - 1
    GAP: tl.constexpr = 0 if TILED else 2 * THREADS_PER_ROW - 2
    thread = tl.arange(0, THREADS_PER_ROW)[None, :] + tl.zeros([BLOCK_T, 1], tl.int32)
    if logits.dtype.element_ty == tl.bfloat16:
        source = first.to(tl.pointer_type(tl.int32), bitcast=True)
    else:
        source = first

    if TILED:
        pairs = load_tile(source, bias, THREADS_PER_ROW, SPEC)
    else:
        pairs = ()
        for i in tl.static_range(STEPS):
            if SELECTION == "logits":
                pairs += load_pairs(source, thread + i * THREADS_PER_ROW)
            else:
                pairs += load_scores(source, bias, thread + i * THREADS_PER_ROW)
    threshold, highest_pair = threshold_of(pairs, GROUP, K)
    EXACT16: tl.constexpr = SELECTION == "logits" and logits.dtype.element_ty != tl.float32
    if EXACT16:
        factor = None
        offset = None
        floor = None
    else:
        least, most, threshold = range_of(threshold, highest_pair, SPEC)
        of_row = window(least, most, MASK)
        factor, offset, floor = of_row[0][:, None], of_row[1][:, None], of_row[2][:, None]

    masks, bases = masks_of(pairs, threshold, thread, TILED)
    column = tl.arange(0, WIDTH)
    is_selected = (column < K)[None, :]
    top, rest, lost = best_of(
        masks, bases, first, bias, floor, factor, offset, GAP, MASK, WIDTH, SPEC
    )
    found = over_threads(top, rest, thread, WIDTH)
    picked = tl.where(is_selected, MASK - (found & MASK).to(tl.int32), 0)
    if EXACT16:
        x = value_of_exact16(found, MASK)
    else:
        x = clean(tl.load(first[:, None] + picked))
        # Over all threads: else the compiler does all above twice.
        is_lossy = factor + thread.to(tl.uint32) * 0 != MASK + 1
        if any_of(is_lossy) != 0:
            every = top + (lost,) if WIDTH == 8 else top + rest + (lost,)
            if any_of(is_ambiguous(every, is_lossy, MASK, K)) != 0:
                exact = in_exact_order(found, first, bias, MASK, SPEC)
                # The list lacks experts that belong into it only where the K-th and the best left
                # out are hard to tell apart.
                kth = every[K - 1] | MASK
                members = count_of(((found | MASK) == kth[:, None]) & is_selected)
                missing = tl.where(kth == (lost | MASK), members, 0)
                exact = best_of_bucket(
                    exact, kth, K - members, missing, masks, bases, first, bias, floor, factor,
                    offset, GAP, MASK, SPEC,
                )  # fmt: skip
                picked, x = from_exact(exact, is_selected, first, SPEC)
    if counts is not None:
        count_slots(
            counts, picked, row, T, valid, num_valid_tokens, SPEC, VALID_ON_DEVICE,
        )  # fmt: skip
    # Late, so that waiting programs of the next kernel do not delay programs of this one.
    launch_dependents(PDL)
    x = activate(x, SPEC)
    highest = tl.zeros([BLOCK_T], tl.float32)
    total = highest
    if SCORE == "softmax" and not SUMS_TO_ONE:
        if CAP != 0.0:
            highest = highest_of_row(first, STEPS, E // 8, BLOCK_T, THREADS_PER_ROW, SPEC)
        else:
            highest = tl.max(tl.where(is_selected, x, -FLOAT32_MAX), axis=1)
        STEPS_2: tl.constexpr = triton.next_power_of_2(STEPS)
        total = sum_of_steps(first, highest, STEPS_2, E // 8, BLOCK_T, THREADS_PER_ROW, SPEC)
    w = selected_weights(x, is_selected, highest, total, SPEC, SCALE)
    store_outputs(
        weights, ids, w, picked, row, T, valid, num_valid_tokens, per_expert_scale, expert_map,
        replica_count, most_replicas, SPEC, VALID_ON_DEVICE,
    )  # fmt: skip


def supports(problem: RoutingProblem, launch: Launch) -> bool:
    """Serve what ``thread_per_row`` serves, if a thread's equal share fits in registers.

    Scores must be logits, or such that can be approximated.
    """
    chunks, threads = problem.num_experts // CHUNK, launch.threads_per_row
    equal = chunks % threads == 0 and chunks <= MOST_CHUNKS * threads
    return kind(problem.spec) != "bias" and equal and thread_per_row.supports(problem, launch)


def constants(problem: RoutingProblem, launch: Launch) -> dict[str, Any]:
    """Group experts, and read whole rows, where that pays."""
    experts, threads = problem.num_experts, launch.threads_per_row
    words = experts // (2 * threads)
    most = max(1, min(experts // (LEAST_GROUPS * problem.topk), words // CHUNK))
    return {
        "WIDTH": list_width(problem),
        "THREADS_PER_ROW": threads,
        "GROUP": max(d for d in (1, 2, 4, 8) if d <= most and words % d == 0),
        "TILED": threads <= MOST_TILED and experts == next_power_of_two(experts),
    }


def runs_on(device: DeviceInfo) -> bool:
    """Run on devices like those on which the variant was measured, and on newer ones.

    Older devices have no packed minimum of bfloat16.
    """
    return device.capability is not None and device.capability >= FROM_CAPABILITY


VARIANT = Variant(moe_routing_filter, supports, constants, partial(one_warp, "filter"), runs_on)
