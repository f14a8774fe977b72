"""Rounding to a shorter dtype."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def nearest(value, dtype: tl.constexpr):
    """Round float32 numbers to the nearest of a dtype, of two the even."""
    if dtype == tl.bfloat16:
        # In integers, since Triton's interpreter truncates here.
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(bits & 0x7FFFFFFF > 0x7F800000, 0x7FC0, rounded)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(dtype)
