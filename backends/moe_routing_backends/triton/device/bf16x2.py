"""Pairs of bfloat16 in one int32.

Two comparisons for the price of one, on GPUs that have packed minima and maxima (sm_90).

An int32 tensor of this backend that is compared is such a pair; keys are unsigned. Each operation
is one PTX instruction. The interpreter takes the function next to it, which agrees in all but which
of NaN and -inf comes out, and nobody asks that.

Biased scores are pairs of float16, which are three bits finer, and compared by the same
instructions: both formats are a sign and a magnitude, so read as bfloat16 the bits of two float16
are in the order of their values. The NaN that arithmetic makes, 0x7FFF, is one in both.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_routing_backends.triton.device.keys import INTERPRETED, at_least

LOWEST_BF16X2 = tl.constexpr(-0x7F0080)
"""-inf in both halves."""


@triton.jit
def unpack_bf16x2(pair):
    """Return the low and the high bfloat16 as float32."""
    return (pair << 16).to(tl.float32, bitcast=True), (pair & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def pack_bf16x2(low, high):
    """Put two float32 that are bfloat16 into a pair."""
    return (high.to(tl.int32, bitcast=True) & -0x10000) | (
        (low.to(tl.int32, bitcast=True) >> 16) & 0xFFFF
    )


@triton.jit
def max_bf16x2(a, b):
    """Return the higher of each half; of NaN and a number the number."""
    if INTERPRETED:
        a0, a1 = unpack_bf16x2(a)
        b0, b1 = unpack_bf16x2(b)
        least: tl.constexpr = float("-inf")
        return pack_bf16x2(
            tl.maximum(at_least(a0, least), at_least(b0, least)),
            tl.maximum(at_least(a1, least), at_least(b1, least)),
        )
    else:
        return tl.inline_asm_elementwise(
            "max.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def min_bf16x2(a, b):
    """Return the lower of each half, for pairs without NaN."""
    if INTERPRETED:
        a0, a1 = unpack_bf16x2(a)
        b0, b1 = unpack_bf16x2(b)
        return pack_bf16x2(tl.minimum(a0, b0), tl.minimum(a1, b1))
    else:
        return tl.inline_asm_elementwise(
            "min.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def swap_halves(pair):
    """Exchange the halves."""
    return ((pair >> 16) & 0xFFFF) | (pair << 16)


@triton.jit
def mask_not_below(pair, threshold, BITS: tl.constexpr):
    """Return the bits of ``BITS`` whose half of ``pair`` is not below that of ``threshold``.

    NaN is never below.
    """
    if INTERPRETED:
        p0, p1 = unpack_bf16x2(pair)
        b0, b1 = unpack_bf16x2(threshold)
        return tl.where(p0 < b0, 0, BITS & 0xFFFF) | tl.where(p1 < b1, 0, BITS & 0xFFFF0000)
    else:
        all_bits = tl.inline_asm_elementwise(
            "set.geu.u32.bf16x2 $0, $1, $2;",
            "=r,r,r",
            [pair, threshold],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )
        return all_bits & BITS


@triton.jit
def round_to_bf16x2(low, high):
    """Round two float32 to the nearest bfloat16 each: if a >= b, so are the rounded."""
    if INTERPRETED:
        l = at_least(low, float("-inf")).to(tl.int32, bitcast=True)
        h = at_least(high, float("-inf")).to(tl.int32, bitcast=True)
        h += 0x7FFF + ((h >> 16) & 1)
        l += 0x7FFF + ((l >> 16) & 1)
        return (h & -0x10000) | ((l >> 16) & 0xFFFF)
    else:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $1, $2;",
            "=r,r,r",
            [high, low],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def round_to_f16x2(low, high):
    """Round two float32 to the nearest float16 each."""
    if INTERPRETED:
        return pack_f16x2(low.to(tl.float16), high.to(tl.float16))
    else:
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $1, $2;",
            "=r,r,r",
            [high, low],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def pack_f16x2(low, high):
    """Put two float16 into a pair; every NaN becomes the one that arithmetic makes."""
    low = tl.where(low == low, low.to(tl.int16, bitcast=True), 0x7FFF).to(tl.int32)  # noqa: PLR0124 -- NaN alone differs
    high = tl.where(high == high, high.to(tl.int16, bitcast=True), 0x7FFF).to(tl.int32)  # noqa: PLR0124 -- likewise
    return (high << 16) | (low & 0xFFFF)


@triton.jit
def low_f16(pair):
    """Return the low float16 as float32."""
    return (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def sigmoid_scores(low, high, bias):
    """Return sigmoid(x) + b as a pair of float16, off by at most ``margin``.

    ``bias`` is the pair of b + 0.5.

    tanh(x / 2) / 2 + (b + 0.5), where the hardware's tangent is off by at most 2**-10.987 (PTX ISA,
    tanh). NaN logits count as -inf; NaN stays a NaN bias.
    """
    if INTERPRETED:
        h0 = at_least(low, float("-inf")).to(tl.float16) * 0.5
        h1 = at_least(high, float("-inf")).to(tl.float16) * 0.5
        u0 = 1.0 - 2.0 / (tl.exp(2.0 * h0.to(tl.float32)) + 1.0)
        u1 = 1.0 - 2.0 / (tl.exp(2.0 * h1.to(tl.float32)) + 1.0)
        return round_to_f16x2(u0 * 0.5 + low_f16(bias), u1 * 0.5 + low_f16(bias >> 16))
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 x, half, least;
            mov.b32 half, 0x38003800;
            mov.b32 least, 0xFC00FC00;
            cvt.rn.f16x2.f32 x, $1, $2;
            max.f16x2 x, x, least;
            mul.rn.f16x2 x, x, half;
            tanh.approx.f16x2 x, x;
            fma.rn.f16x2 $0, x, half, $3;
            }""",
            "=r,r,r,r", [high, low, bias], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def margin(score):
    """Return twice what ``sigmoid_scores`` may be off near a score, and more.

    With s for a score and S for what stands in the pair, |S - s| <= d + c |S|: of the tangent
    2**-11.987, of its argument's rounding 0.23 * 2**-11, of the bias 2**-11 (|S| + 0.5), of the sum
    2**-11 |S|; together d = 0.00062, c = 2**-10. The K experts whose S is not below the threshold B
    have s >= B - d - c |B|, so the K-th highest s is not below that, and an expert with such an s
    has S >= B - 2 d - 2 c |B|, but for c**2. Rounding the threshold to float16 again costs 2**-11
    |B|.
    """
    return 0.0016 + 0.0028 * tl.abs(score)


@triton.jit
def index_of_bit(bit):
    """Return the index of the only bit that is set in a uint32; of 0, some number."""
    if INTERPRETED:
        return (bit.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
    else:
        return tl.inline_asm_elementwise(
            "bfind.u32 $0, $1;", "=r,r", [bit], dtype=tl.int32, is_pure=True, pack=1
        )
