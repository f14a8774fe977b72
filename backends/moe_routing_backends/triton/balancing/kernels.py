"""The kernels of ``balance``: sums over tokens of their scores, and the gradient of the logits.

Tile: ``[ROWS, N]`` logits, whole rows in registers. A program takes every ``chunks``-th tile of one
batch. It reads a row once, divides its scores by their sum, and adds them up as it goes. Ids are
counted after that, ``SLOTS`` at a time (``HISTOGRAMS``): to compare each with every column took
longer than the scores. Each program leaves one partial sum and the host adds those in one order, so
that the same bits come of every run. The way back reads the row again, and writes its gradient
once.

A token that does not count is selected away, never multiplied: it may hold NaN. Where the best are
counted, weights are factors.

All rows begin at multiples of ``VEC`` elements, up to 16 bytes, which the compiler is told.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_routing_backends.triton.device.pdl import grid_dependency_wait
from moe_routing_backends.triton.device.rounding import nearest
from moe_routing_backends.triton.device.scores import exp, log_slope, sigmoid, sqrtsoftplus
from moe_routing_backends.triton.planning.kernels import HISTOGRAM_MASKS

NOT_SPECIALIZED = (
    "logits", "ids", "weights", "sums", "counts", "grad", "grad_logits", "tokens", "chunks",
    "batch_stride", "stride",
)  # fmt: skip
"""Arguments whose value or alignment must not select another compiled kernel: all of them."""
HISTOGRAMS = tl.constexpr(HISTOGRAM_MASKS)
"""Triton 3.3's, and so Triton-XPU's, takes no mask, and does not compile in this kernel: there each
id is compared with every column."""
SLOTS = tl.constexpr(1024)
"""Ids that are counted at a time: at least one for each thread."""


@triton.jit
def place_of(chunks):
    """Return the batch and the first tile of this program."""
    program = tl.program_id(0)
    return tl.cast(program // chunks, tl.int64), program % chunks


@triton.jit
def rows_at(tensor, first, column, VEC: tl.constexpr):
    """Return addresses of rows ``[ROWS, N]`` that begin at ``first [ROWS]``.

    What the compiler is told belongs to the sum: it forgets what it is told of an argument.
    """
    BYTES: tl.constexpr = VEC * tensor.dtype.element_ty.primitive_bitwidth // 8
    at = tensor + (first[:, None] + column)
    return tl.multiple_of(at, [1, BYTES])


@triton.jit
def load_rows(
    logits, weights, batch, row, tokens, batch_stride, stride, E: tl.constexpr, N: tl.constexpr,
    VEC: tl.constexpr,
):  # fmt: skip
    """Return rows of logits in float32, -inf past the last expert, and how much each row counts."""
    inside = row < tokens
    column = tl.arange(0, N)[None, :]
    at = rows_at(logits, batch * batch_stride + tl.cast(row, tl.int64) * stride, column, VEC)
    x = tl.load(at, mask=inside[:, None] & (column < E), other=float("-inf")).to(tl.float32)
    if weights is not None:
        weight = tl.load(weights + (batch * tokens + row), mask=inside, other=0).to(tl.float32)
    else:
        weight = inside.to(tl.float32)
    return x, weight


@triton.jit
def exponentials(x, shift):
    """Return e**(x - shift), NaN and infinity too; ``exp`` itself clamps them."""
    d = x - shift
    return tl.where(d <= 0.0, exp(d), d)


@triton.jit
def shares_of(x, SCORE: tl.constexpr):
    """Return scores ``[ROWS, N]`` divided by the sum of their row."""
    highest = tl.max(x, axis=1)[:, None]
    if SCORE == "softmax":
        v = exponentials(x, highest)
    else:
        # The scores times a factor for which one of them is not small.
        shift = tl.minimum(highest, 0.0)
        v = sigmoid(x, shift) if SCORE == "sigmoid" else sqrtsoftplus(x, shift)
        v = tl.where(x == x, v, x)  # noqa: PLR0124 -- only NaN differs from itself
    return v / tl.sum(v, axis=1)[:, None]


@triton.jit
def logsumexp_of(x):
    """Return log(sum(e**x)) ``[ROWS, 1]``, and the terms of the sum divided by it."""
    highest = tl.max(x, axis=1)[:, None]
    shift = tl.where(tl.abs(highest) == float("inf"), 0.0, highest)
    v = exponentials(x, shift)
    total = tl.sum(v, axis=1)[:, None]
    return shift + tl.log(total), v / total


@triton.jit
def best_of(shares, weight, K: tl.constexpr, PACKED: tl.constexpr):
    """Return the weight at the K highest of each row, of equal ones at the first, 0 elsewhere.

    :param shares: 0 or more, and -1 past the last expert.
    :param PACKED: the low bits of the shares are 0, and have room for a column's number from 1 on.
    """
    N: tl.constexpr = shares.shape[1]
    column = tl.arange(0, N)[None, :]
    # NaN counts as 0: a row with one is all NaN, and so are the sums.
    left = tl.where(shares == shares, shares, 0.0)  # noqa: PLR0124 -- only NaN differs from itself
    found = tl.zeros(shares.shape, tl.float32)
    if PACKED:
        # The complement of the column in the low bits: no two are equal, and one maximum a round
        # finds the best and breaks the tie.
        key = left.to(tl.int32, bitcast=True) | (N - column)
        key = tl.where(left < 0.0, 0, key)
        for _ in range(K):
            is_best = key == tl.max(key, axis=1)[:, None]
            found = tl.where(is_best, weight, found)
            key = tl.where(is_best, 0, key)
    else:
        for _ in range(K):
            highest = tl.max(left, axis=1)[:, None]
            first = tl.min(tl.where(left == highest, column, N), axis=1)[:, None]
            is_best = column == first
            found = tl.where(is_best, weight, found)
            left = tl.where(is_best, -1.0, left)
    return found


@triton.jit
def counted_ids(
    ids, weights, batch, tile, tokens, chunks, E: tl.constexpr, K: tl.constexpr, BINS: tl.constexpr
):
    """Count this program's part of a batch's ids, in ``BINS`` bins of which the first E matter."""
    found = tl.zeros([BINS], tl.int32)
    slots = tokens * K
    for first in range(tl.cast(tile, tl.int64) * SLOTS, slots, chunks * SLOTS):
        slot = first + tl.arange(0, SLOTS)
        inside = slot < slots
        if weights is not None:
            inside = inside & (
                tl.load(weights + (batch * tokens + slot // K), mask=inside, other=0) != 0
            )
        its = tl.load(ids + (batch * slots + slot), mask=inside, other=-1)
        # In the ids' own width: what is past E may not be past it in 32 bits.
        there = (its >= 0) & (its < E)
        found += tl.histogram(tl.where(there, its, 0).to(tl.int32), BINS, mask=there)
    return found


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def moe_routing_balance(
    logits, ids, weights, sums, counts, tokens: tl.int64, chunks: tl.int32, batch_stride: tl.int64,
    stride: tl.int64, SCORE: tl.constexpr, BEST: tl.constexpr, E: tl.constexpr, K: tl.constexpr,
    N: tl.constexpr, BINS: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr,
    PACKED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Leave this program's part of ``sums`` and ``counts [B, chunks, E]``.

    :param PACKED: a score, rounded to the logits' dtype, and a column fit into 32 bits.
    """
    batch, tile = place_of(chunks)
    column = tl.arange(0, N)
    grid_dependency_wait(PDL)
    total = tl.zeros([ROWS, 1 if SCORE == "logsumexp" else N], tl.float32)
    hits = tl.zeros([ROWS, N], tl.float32 if BEST else tl.int32)
    for first in range(tile * ROWS, tokens, chunks * ROWS):
        row = first + tl.arange(0, ROWS)
        x, weight = load_rows(logits, weights, batch, row, tokens, batch_stride, stride, E, N, VEC)
        counted = weight != 0.0
        if SCORE == "logsumexp":
            lse, _ = logsumexp_of(x)
            total += tl.where(counted[:, None], lse * lse, 0.0)
        else:
            shares = shares_of(x, SCORE)
            if BEST:
                inside = (row < tokens)[:, None]
                shares = nearest(shares, logits.dtype.element_ty).to(tl.float32)
                shares = tl.where(column[None, :] < E, shares, -1.0)
                hits += tl.where(inside, best_of(shares, weight[:, None], K, PACKED), 0.0)
                total += tl.where(inside, shares * weight[:, None], 0.0)
            else:
                total += tl.where(counted[:, None], shares, 0.0)
                if not HISTOGRAMS:
                    slot = ids + (batch * tokens + row) * K
                    for k in range(K):
                        its = tl.load(slot + k, mask=counted, other=-1)
                        its = tl.where((its >= 0) & (its < E), its, -1).to(tl.int32)
                        hits += (its[:, None] == column[None, :]).to(tl.int32)
    program = tl.program_id(0).to(tl.int64)
    if SCORE == "logsumexp":
        tl.store(sums + program, tl.sum(tl.reshape(total, [ROWS]), axis=0))
    else:
        tl.store(sums + (program * E + column), tl.sum(total, axis=0), mask=column < E)
        if BEST or not HISTOGRAMS:
            tl.store(counts + (program * E + column), tl.sum(hits, axis=0), mask=column < E)
        else:
            found = counted_ids(ids, weights, batch, tile, tokens, chunks, E, K, BINS)
            expert = tl.arange(0, BINS)
            tl.store(counts + (program * E + expert), found, mask=expert < E)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def moe_routing_balance_backward(
    grad, logits, weights, grad_logits, tokens: tl.int64, chunks: tl.int32, batch_stride: tl.int64,
    stride: tl.int64, SCORE: tl.constexpr, BEST: tl.constexpr, E: tl.constexpr, N: tl.constexpr,
    ROWS: tl.constexpr, VEC: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the logits, given that of the sums."""
    batch, tile = place_of(chunks)
    column = tl.arange(0, N)[None, :]
    grid_dependency_wait(PDL)
    if SCORE == "logsumexp":
        of_sums = tl.load(grad + batch)
    else:
        of_sums = tl.load(grad + (batch * E + column), mask=column < E, other=0.0)
    for first in range(tile * ROWS, tokens, chunks * ROWS):
        row = first + tl.arange(0, ROWS)
        x, weight = load_rows(logits, weights, batch, row, tokens, batch_stride, stride, E, N, VEC)
        if SCORE == "logsumexp":
            lse, shares = logsumexp_of(x)
            of_x = 2.0 * lse * shares * of_sums
        else:
            shares = shares_of(x, SCORE)
            of_shares = tl.broadcast_to(of_sums, [ROWS, N])
            if BEST:
                shares = nearest(shares, logits.dtype.element_ty).to(tl.float32)
                of_shares = nearest(of_shares * weight[:, None], logits.dtype.element_ty)
                of_shares = of_shares.to(tl.float32)
            mean = tl.sum(shares * of_shares, axis=1)[:, None]
            of_x = shares * (of_shares - mean)
            if SCORE != "softmax":
                of_x = of_x * log_slope(x, SCORE)
        if not BEST:
            of_x = tl.where((weight != 0.0)[:, None], of_x, 0.0)
        to_row = rows_at(grad_logits, (batch * tokens + row) * E, column, VEC)
        inside = (row < tokens)[:, None] & (column < E)
        tl.store(to_row, nearest(of_x, grad_logits.dtype.element_ty), mask=inside)
