"""Rows in chunks of 8 experts, 16 bytes of 16-bit logits.

They are loaded, packed into exact keys, and summed up for softmax over a whole row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_routing_backends.triton.device.keys import FLOAT32_MAX, clean, ordered_key, value_of_key
from moe_routing_backends.triton.device.scores import activate, exp_of_many, tree_sum


@triton.jit
def split8(tile):
    """Split ``[ROWS, THREADS_PER_ROW, 8]`` into 8 tensors ``[ROWS, THREADS_PER_ROW]``."""
    ROWS: tl.constexpr = tile.shape[0]
    THREADS_PER_ROW: tl.constexpr = tile.shape[1]
    # Column 4 a + 2 b + c is at [a, b, c]: tl.split takes the last dimension apart, so three splits
    # reach every column. All stay in registers.
    even, odd = tl.split(tl.reshape(tile, [ROWS, THREADS_PER_ROW, 2, 2, 2]))
    x04, x26 = tl.split(even)
    x15, x37 = tl.split(odd)
    x0, x4 = tl.split(x04)
    x2, x6 = tl.split(x26)
    x1, x5 = tl.split(x15)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def load_chunk(first, chunk, known):
    """Load the 8 logits of ``chunk [ROWS, THREADS_PER_ROW]``, as ``[ROWS, THREADS_PER_ROW, 8]``.

    0 where not ``known`` (``None``: all are).
    """
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
        # The join puts the two halves in the last dimension; permuted before it, columns are in
        # order.
        return tl.reshape(
            tl.permute(tl.join(low, high), [0, 1, 3, 2]), [low.shape[0], low.shape[1], 8]
        )


@triton.jit
def either(a, b):
    """Combine bits."""
    return a | b


@triton.jit
def count_of(chosen):
    """Count the columns ``chosen [ROWS, N]`` of each row.

    In float32, because of Triton 3.6's LLVM: it looks through sums of integers in loops, and here
    compiles for minutes.
    """
    return tl.sum(tl.where(chosen, 1.0, 0.0), axis=1).to(tl.int32)


@triton.jit
def exact_key(t, index):
    """Pack a clean float32 and its index into one uint64: higher score first, then lower index.

    The key is never 0.
    """
    return (ordered_key(t).to(tl.uint64) << 32) | (0xFFFF - index).to(tl.uint64)


@triton.jit
def from_exact(exact, is_selected, first, SPEC: tl.constexpr):
    """Return the indices in ``exact [ROWS, N]``, 0 where not selected, and their clean logits."""
    SELECTION: tl.constexpr = SPEC.value.selection
    picked = tl.where(is_selected, 0xFFFF - (exact & 0xFFFF).to(tl.int32), 0)
    if SELECTION == "logits":
        x = value_of_key((exact >> 32).to(tl.uint32))
    else:
        x = clean(tl.load(first[:, None] + picked))
    return picked, x


@triton.jit
def sum_of_steps(
    first,
    highest,
    STEPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    THREADS_PER_ROW: tl.constexpr,
    SPEC: tl.constexpr,
):
    """Sum e**(x - highest) over a row, in the shape of ``tree_sum``.

    A row is ``STEPS`` steps, a power of two, of ``THREADS_PER_ROW`` chunks each. ``sums`` is a
    stack, ``(latest, those below)``, of sums over 1, 2, 4, ... steps: two of a size are added at
    once.
    """
    sums = highest  # the stack's bottom, which is never read
    for i in tl.static_range(STEPS):
        if i * THREADS_PER_ROW < CHUNKS:
            chunk = (
                i * THREADS_PER_ROW
                + tl.arange(0, THREADS_PER_ROW)[None, :]
                + tl.zeros([ROWS, 1], tl.int32)
            )
            known = chunk < CHUNKS
            x = activate(clean(load_chunk(first, chunk, known)), SPEC)
            p = tl.where(
                known[:, :, None], exp_of_many(tl.minimum(x - highest[:, None, None], 0.0)), 0.0
            )
            # The chunks of all threads lie next to each other in the row.
            step = tree_sum(tl.reshape(p, [ROWS, THREADS_PER_ROW * 8]))
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
    first,
    STEPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    THREADS_PER_ROW: tl.constexpr,
    SPEC: tl.constexpr,
):
    """Return the highest activated logit of each row."""
    found = tl.full([ROWS, THREADS_PER_ROW], -FLOAT32_MAX, tl.float32)
    for i in range(STEPS):
        chunk = (
            i * THREADS_PER_ROW
            + tl.arange(0, THREADS_PER_ROW)[None, :]
            + tl.zeros([ROWS, 1], tl.int32)
        )
        known = chunk < CHUNKS
        x = activate(clean(load_chunk(first, chunk, known)), SPEC)
        found = tl.maximum(found, tl.where(known, tl.max(x, axis=2), -FLOAT32_MAX))
    return tl.max(found, axis=1)
