"""Ordered keys: float bits as integers of the same order.

One integer comparison then decides both score and tie.

A float is sign and magnitude; as a two's complement number of the same sign and magnitude its bits
are in the order of the values, and -0 and +0 are both 0. Every selection in this backend compares
such integers, so every variant orders alike.
"""

from __future__ import annotations

import triton
import triton.language as tl

FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)


@triton.jit
def at_least(x, lowest):
    """Return the higher of float32 ``x`` and ``lowest``; NaN gives ``lowest``.

    Of NaN and a number a GPU's maximum is the number, as IEEE 754's maxNum; NumPy's, in the
    interpreter, is NaN.
    """
    if INTERPRETED:
        x = tl.where(x == x, x, lowest)  # noqa: PLR0124 -- only NaN differs from itself
    return tl.maximum(x, lowest)


INTERPRETED = tl.constexpr(not isinstance(at_least, triton.JITFunction))


@triton.jit
def clean(x):
    """Widen to float32, count NaN as -inf, clamp to the finite range."""
    return tl.minimum(at_least(x.to(tl.float32), -FLOAT32_MAX), FLOAT32_MAX)


@triton.jit
def ordered_key(x):
    """Map finite float32 to uint32 in the same order.

    -0 and +0 get the same key. No number gets 0, which is the key of 'not eligible'.

    With sign s = -1 for negative x and 0 otherwise, (m ^ s) - s is -m or m: the magnitude's bits m
    as a signed number.
    """
    bits = x.to(tl.int32, bitcast=True)
    sign = bits >> 31
    signed = ((bits & 0x7FFFFFFF) ^ sign) - sign
    return (signed ^ -0x80000000).to(tl.uint32, bitcast=True)


@triton.jit
def value_of_key(key):
    """Invert ``ordered_key``.

    The key 0 gives -0.0's neighbour below every finite number and is never asked for.
    """
    signed = key.to(tl.int32, bitcast=True) ^ -0x80000000
    sign = signed >> 31
    return (((signed ^ sign) - sign) | (sign & -0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def ordered_bits(t, ZEROS: tl.constexpr = True):
    """Map clean float32 to uint32 in the same order, neighbours to neighbours.

    ``ZEROS``: whether t may be -0, which counts as +0. ``t + 0.0`` turns -0 into +0; flipping the
    sign of positive and all bits of negative floats is the usual map.
    """
    bits = (t + 0.0 if ZEROS else t).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -0x80000000)).to(tl.uint32, bitcast=True)


@triton.jit
def with_index(bits, index, MASK: tl.constexpr):
    """Put the complement of an index into the low bits of a uint32."""
    return ((bits & (MASK ^ 0xFFFFFFFF)) | index.to(tl.uint32)) ^ MASK


@triton.jit
def truncated_key(t, index, MASK: tl.constexpr):
    """Pack the high bits of a clean float32 and the complement of its index into one uint32.

    The index is at most ``MASK``. If a > b then their rough keys, indices aside, are in this order
    or equal.
    """
    ordered = ordered_bits(t).to(tl.int32, bitcast=True)
    return ((ordered & ~MASK) | (MASK - index)).to(tl.uint32, bitcast=True)


@triton.jit
def value_of_truncated(key):
    """Invert the order-preserving map in ``truncated_key``.

    A key with its index bits cleared or set bounds its score.
    """
    ordered = key.to(tl.int32, bitcast=True)
    return (ordered ^ (~(ordered >> 31) | -0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def exact16_key(x, index, MASK: tl.constexpr):
    """Pack a 16-bit float and the complement of its index into one uint32, exactly.

    As float32, bfloat16 has 16 low bits that are 0 and float16 has 13, and indices take 11. NaN
    counts as -inf.
    """
    return truncated_key(at_least(x.to(tl.float32), float("-inf")), index, MASK)


@triton.jit
def value_of_exact16(key, MASK: tl.constexpr):
    """Return the clean float32 value inside a ``exact16_key``."""
    ordered = key.to(tl.int32, bitcast=True)
    bits = (ordered ^ (~(ordered >> 31) | -0x80000000)) & ~MASK
    return clean(bits.to(tl.float32, bitcast=True))
