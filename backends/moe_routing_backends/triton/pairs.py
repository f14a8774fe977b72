"""Pairs of bfloat16 in one int32: two comparisons for the price of one, on GPUs that have packed minima and maxima (sm_90).

An int32 tensor of this backend that is compared is such a pair; keys are unsigned. Each operation is one PTX instruction.
The interpreter takes the twin beside it, which agrees in all but which of NaN and -inf comes out, and nobody asks that.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_routing_backends.triton.keys import INTERPRETED, at_least

LEAST_PAIR = tl.constexpr(-0x7F0080)
"""-inf in both halves."""


@triton.jit
def halves(pair):
    """Return the low and the high bfloat16 as float32."""
    return (pair << 16).to(tl.float32, bitcast=True), (pair & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def joined(low, high):
    """Put two float32 that are bfloat16 into a pair."""
    return (high.to(tl.int32, bitcast=True) & -0x10000) | ((low.to(tl.int32, bitcast=True) >> 16) & 0xFFFF)


@triton.jit
def pair_max(a, b):
    """Return the higher of each half; of NaN and a number the number."""
    if INTERPRETED:
        a0, a1 = halves(a)
        b0, b1 = halves(b)
        least: tl.constexpr = float("-inf")
        return joined(
            tl.maximum(at_least(a0, least), at_least(b0, least)), tl.maximum(at_least(a1, least), at_least(b1, least))
        )
    else:
        return tl.inline_asm_elementwise("max.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def pair_min(a, b):
    """Return the lower of each half, for pairs without NaN."""
    if INTERPRETED:
        a0, a1 = halves(a)
        b0, b1 = halves(b)
        return joined(tl.minimum(a0, b0), tl.minimum(a1, b1))
    else:
        return tl.inline_asm_elementwise("min.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def swapped(pair):
    """Exchange the halves."""
    return ((pair >> 16) & 0xFFFF) | (pair << 16)


@triton.jit
def not_below(pair, bar, BITS: tl.constexpr):
    """Return the bits of ``BITS`` whose half of ``pair`` is not below that of ``bar``; NaN never is."""
    if INTERPRETED:
        p0, p1 = halves(pair)
        b0, b1 = halves(bar)
        return tl.where(p0 < b0, 0, BITS & 0xFFFF) | tl.where(p1 < b1, 0, BITS & 0xFFFF0000)
    else:
        all_bits = tl.inline_asm_elementwise(
            "set.geu.u32.bf16x2 $0, $1, $2;", "=r,r,r", [pair, bar], dtype=tl.uint32, is_pure=True, pack=1
        )
        return all_bits & BITS


@triton.jit
def rounded(low, high):
    """Round two float32 to the nearest bfloat16 each: if a >= b, so are the rounded."""
    if INTERPRETED:
        l = at_least(low, float("-inf")).to(tl.int32, bitcast=True)
        h = at_least(high, float("-inf")).to(tl.int32, bitcast=True)
        h += 0x7FFF + ((h >> 16) & 1)
        l += 0x7FFF + ((l >> 16) & 1)
        return (h & -0x10000) | ((l >> 16) & 0xFFFF)
    else:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,r,r", [high, low], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def index_of_bit(bit):
    """Return the index of the only bit that is set in a uint32; of 0, some number."""
    if INTERPRETED:
        return (bit.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
    else:
        return tl.inline_asm_elementwise("bfind.u32 $0, $1;", "=r,r", [bit], dtype=tl.int32, is_pure=True, pack=1)
