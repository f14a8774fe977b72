"""Sorting networks over registers.

Lists of 8 or 16 keys, descending, each key an unsigned integer or a pair.

Eight keys are sorted with Batcher's 19 comparators (Batcher, Sorting networks and their
applications, 1968). Of two descending lists a and b of 8, the 8 highest are max(a[i], b[7 - i]), a
bitonic list, which 12 comparators sort.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_routing_backends.triton.device.bf16x2 import max_bf16x2, min_bf16x2


@triton.jit
def compare(a, b):
    """Return the higher and the lower.

    One comparison serves both where a key takes two registers.
    """
    if a.dtype == tl.uint64:
        first = a > b
        return tl.where(first, a, b), tl.where(first, b, a)
    elif a.dtype == tl.int32:
        return max_bf16x2(a, b), min_bf16x2(a, b)
    else:
        return tl.maximum(a, b), tl.minimum(a, b)


@triton.jit
def higher(a, b):
    """Return the higher key."""
    if a.dtype == tl.uint64:
        return tl.where(a > b, a, b)
    elif a.dtype == tl.int32:
        return max_bf16x2(a, b)
    else:
        return tl.maximum(a, b)


@triton.jit
def sort4(s):
    """Sort a tuple of 4 keys, highest first."""
    a, b, c, d = s
    a, b = compare(a, b)
    c, d = compare(c, d)
    a, c = compare(a, c)
    b, d = compare(b, d)
    b, c = compare(b, c)
    return a, b, c, d


@triton.jit
def sort8(s):
    """Sort a tuple of 8 keys, highest first."""
    a, b, c, d, e, f, g, h = s
    a, b = compare(a, b)
    c, d = compare(c, d)
    e, f = compare(e, f)
    g, h = compare(g, h)
    a, c = compare(a, c)
    b, d = compare(b, d)
    e, g = compare(e, g)
    f, h = compare(f, h)
    b, c = compare(b, c)
    f, g = compare(f, g)
    a, e = compare(a, e)
    b, f = compare(b, f)
    c, g = compare(c, g)
    d, h = compare(d, h)
    c, e = compare(c, e)
    d, f = compare(d, f)
    b, c = compare(b, c)
    d, e = compare(d, e)
    f, g = compare(f, g)
    return a, b, c, d, e, f, g, h


@triton.jit
def sort_bitonic8(t):
    """Sort a bitonic tuple of 8 keys, highest first."""
    a, b, c, d, e, f, g, h = t
    a, e = compare(a, e)
    b, f = compare(b, f)
    c, g = compare(c, g)
    d, h = compare(d, h)
    a, c = compare(a, c)
    b, d = compare(b, d)
    e, g = compare(e, g)
    f, h = compare(f, h)
    a, b = compare(a, b)
    c, d = compare(c, d)
    e, f = compare(e, f)
    g, h = compare(g, h)
    return a, b, c, d, e, f, g, h


@triton.jit
def best8(t, s):
    """Return the 8 highest of two descending tuples, as a bitonic tuple."""
    return (
        higher(t[0], s[7]), higher(t[1], s[6]), higher(t[2], s[5]), higher(t[3], s[4]),
        higher(t[4], s[3]), higher(t[5], s[2]), higher(t[6], s[1]), higher(t[7], s[0]),
    )  # fmt: skip


@triton.jit
def highest_lost(lost, t, s):
    """Return the highest of ``lost`` and the 8 keys that ``best8(t, s)`` leaves."""
    a = tl.maximum(tl.minimum(t[0], s[7]), tl.minimum(t[1], s[6]))
    b = tl.maximum(tl.minimum(t[2], s[5]), tl.minimum(t[3], s[4]))
    c = tl.maximum(tl.minimum(t[4], s[3]), tl.minimum(t[5], s[2]))
    d = tl.maximum(tl.minimum(t[6], s[1]), tl.minimum(t[7], s[0]))
    return tl.maximum(lost, tl.maximum(tl.maximum(a, b), tl.maximum(c, d)))


@triton.jit
def merge16(t, s):
    """Merge two descending tuples of 8 into one of 16, as its two halves."""
    a, p = compare(t[0], s[7])
    b, q = compare(t[1], s[6])
    c, r = compare(t[2], s[5])
    d, u = compare(t[3], s[4])
    e, v = compare(t[4], s[3])
    f, w = compare(t[5], s[2])
    g, x = compare(t[6], s[1])
    h, y = compare(t[7], s[0])
    return sort_bitonic8((a, b, c, d, e, f, g, h)), sort_bitonic8((p, q, r, u, v, w, x, y))


@triton.jit
def insert(top, rest, lost, s, WIDTH: tl.constexpr):
    """Put 8 descending keys into the list of the ``WIDTH`` highest, ``top`` and (of 16) ``rest``.

    Return the list, and the highest key that is left out.
    """
    if WIDTH == 8:
        return sort_bitonic8(best8(top, s)), rest, highest_lost(lost, top, s)
    else:
        top_, rest_ = merge16(top, sort_bitonic8(best8(rest, s)))
        return top_, rest_, highest_lost(lost, rest, s)


@triton.jit
def across8(a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7):
    """Return the 8 highest of two descending lists: what ``tl.reduce`` calls."""
    return sort_bitonic8(best8((a0, a1, a2, a3, a4, a5, a6, a7), (b0, b1, b2, b3, b4, b5, b6, b7)))


@triton.jit
def best_across8(a0, a1, a2, a3, a4, a5, a6, a7, a_lost, b0, b1, b2, b3, b4, b5, b6, b7, b_lost):
    """Combine the lists of two threads, and the highest keys that they left out.

    ``tl.reduce`` calls it.
    """
    a, b = (a0, a1, a2, a3, a4, a5, a6, a7), (b0, b1, b2, b3, b4, b5, b6, b7)
    t, _rest, lost = insert(a, a, tl.maximum(a_lost, b_lost), b, 8)
    return t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], lost


@triton.jit
def best_across16(
    a0, a1, a2, a3, a4, a5, a6, a7, c0, c1, c2, c3, c4, c5, c6, c7, a_lost,
    b0, b1, b2, b3, b4, b5, b6, b7, d0, d1, d2, d3, d4, d5, d6, d7, b_lost,
):  # fmt: skip
    """Combine the lists of 16 of two threads."""
    t, r = (a0, a1, a2, a3, a4, a5, a6, a7), (c0, c1, c2, c3, c4, c5, c6, c7)
    t, r, lost = insert(t, r, tl.maximum(a_lost, b_lost), (b0, b1, b2, b3, b4, b5, b6, b7), 16)
    t, r, lost = insert(t, r, lost, (d0, d1, d2, d3, d4, d5, d6, d7), 16)
    return (
        t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7],
        r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7], lost,
    )  # fmt: skip


@triton.jit
def merge_lists(top, rest, lost, AXIS: tl.constexpr, WIDTH: tl.constexpr):
    """Merge the lists of the threads along an axis, and the highest keys that they left out.

    In a list of 8, ``rest`` is ``top``.
    """
    if WIDTH == 8:
        # tl.reduce takes and returns flat tuples: the list is spread out here and put together
        # again below.
        m = tl.reduce(
            (top[0], top[1], top[2], top[3], top[4], top[5], top[6], top[7], lost),
            AXIS, best_across8,
        )  # fmt: skip
        merged = (m[0], m[1], m[2], m[3], m[4], m[5], m[6], m[7])
        return merged, merged, m[8]
    else:
        m = tl.reduce(
            (top[0], top[1], top[2], top[3], top[4], top[5], top[6], top[7],
             rest[0], rest[1], rest[2], rest[3], rest[4], rest[5], rest[6], rest[7], lost),
            AXIS, best_across16,
        )  # fmt: skip
        merged = (m[0], m[1], m[2], m[3], m[4], m[5], m[6], m[7])
        return merged, (m[8], m[9], m[10], m[11], m[12], m[13], m[14], m[15]), m[16]


@triton.jit
def in_columns8(t):
    """Lay a tuple of 8 ``[ROWS]`` next to each other, ``[ROWS, 8]``."""
    # The inverse of `chunks.split8`: bit 2 of a column is the innermost join, bit 0 the outermost.
    even = tl.join(tl.join(t[0], t[4]), tl.join(t[2], t[6]))
    odd = tl.join(tl.join(t[1], t[5]), tl.join(t[3], t[7]))
    return tl.reshape(tl.join(even, odd), [t[0].shape[0], 8])


@triton.jit
def in_columns(top, rest, WIDTH: tl.constexpr):
    """Lay the list next to each other, ``[ROWS, WIDTH]``."""
    if WIDTH == 8:
        return in_columns8(top)
    else:
        # Permuted so that the first list comes before the second, rather than alternating with it.
        both = tl.permute(tl.join(in_columns8(top), in_columns8(rest)), [0, 2, 1])
        return tl.reshape(both, [top[0].shape[0], 16])


@triton.jit
def over_threads(top, rest, thread, WIDTH: tl.constexpr):
    """Lay the list out as ``[ROWS, WIDTH]``, a share of the columns with each thread of a row.

    Every thread of a row knows the whole list by then. This way each goes on with ``WIDTH /
    THREADS_PER_ROW`` columns, in the layout of the stores.

    :param thread: ``[ROWS, THREADS_PER_ROW]``, the number of each thread in its row.
    """
    THREADS_PER_ROW: tl.constexpr = thread.shape[1]
    if THREADS_PER_ROW == 1 or THREADS_PER_ROW > WIDTH:
        return in_columns(top, rest, WIDTH)
    else:
        SHARE: tl.constexpr = WIDTH // THREADS_PER_ROW
        every = top + rest
        share = ()
        for i in tl.static_range(SHARE):
            mine = every[i][:, None] + tl.zeros(thread.shape, every[i].dtype)
            for j in tl.static_range(1, THREADS_PER_ROW):
                mine = tl.where(thread == j, every[j * SHARE + i][:, None], mine)
            share += (mine,)
        if SHARE == 8:
            # Joined so that reading the joined dimensions in order gives the columns in order.
            even = tl.join(tl.join(share[0], share[4]), tl.join(share[2], share[6]))
            odd = tl.join(tl.join(share[1], share[5]), tl.join(share[3], share[7]))
            tile = tl.join(even, odd)
        elif SHARE == 4:
            tile = tl.join(tl.join(share[0], share[2]), tl.join(share[1], share[3]))
        elif SHARE == 2:
            tile = tl.join(share[0], share[1])
        else:
            tile = share[0]
        # The columns of a thread lie next to each other, so this moves nothing between threads.
        return tl.reshape(tile, [thread.shape[0], WIDTH])
