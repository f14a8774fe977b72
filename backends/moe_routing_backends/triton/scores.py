"""The float maths that all variants share: activation, scores, weights.

A row's bits must not depend on the variant that its batch picked, so every sum here has one fixed shape, ``tree_sum``,
kernels are compiled without fused multiply-adds that the compiler invents, and there is one copy of each formula.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_routing_backends.triton.keys import FLOAT32_MAX

LOG2E_HIGH = tl.constexpr(1.4426950216293335)
"""log2(e) rounded to float32; LOW is the rest."""
LOG2E_LOW = tl.constexpr(1.9259629911266175e-08)
LN2 = tl.constexpr(0.6931471805599453)
UNDERFLOW = tl.constexpr(-150.0)
"""exp of it is 0 in float32; a bound below which nothing need be told apart keeps inf - inf out of ``exp``."""
SOFTPLUS_IS_EXP = tl.constexpr(-17.0)
"""Below it log(1 + e^x) is e^x to within half a rounding step of float32."""
TANH_SERIES_UP_TO = tl.constexpr(0.625)


@triton.jit
def exp(d):
    """Return e**d for d <= 88 to about 2 ulp.

    2**y is exact in y's integer part, so the error is that of y = d log2(e); its rounding error r is computed by a fused
    multiply-add and put back as 2**(y + r) = 2**y (1 + r ln 2).
    """
    d = tl.maximum(d, UNDERFLOW)
    y = d * LOG2E_HIGH
    r = tl.fma(d, LOG2E_LOW, tl.fma(d, LOG2E_HIGH, -y))
    e = tl.math.exp2(y)
    return tl.fma(e * LN2, r, e)


@triton.jit
def exp_of_many(d):
    """Return e**d for d <= 0 with one rounding less cared for: for sums, where a term's error counts by its share."""
    return tl.math.exp2(tl.maximum(d, UNDERFLOW) * LOG2E_HIGH)


@triton.jit
def log1p(e):
    """Compute the logarithm of 1 + e for 0 <= e <= 1: 2 artanh(s) with s = e / (2 + e) <= 1/3, whose series ends at s**15."""
    s = e / (2.0 + e)
    q = s * s
    p = tl.fma(q, 1.0 / 15.0, 1.0 / 13.0)
    p = tl.fma(q, p, 1.0 / 11.0)
    p = tl.fma(q, p, 1.0 / 9.0)
    p = tl.fma(q, p, 1.0 / 7.0)
    p = tl.fma(q, p, 1.0 / 5.0)
    p = tl.fma(q, p, 1.0 / 3.0)
    return 2.0 * tl.fma(s * q, p, s)


@triton.jit
def tanh(a):
    """Compute the hyperbolic tangent: the minimax polynomial of the Cephes library near 0, 1 - 2 / (e**2|a| + 1) elsewhere."""
    z = a * a
    p = tl.fma(z, -5.70498872745e-3, 2.06390887954e-2)
    p = tl.fma(z, p, -5.37397155531e-2)
    p = tl.fma(z, p, 1.33314422036e-1)
    p = tl.fma(z, p, -3.33332819422e-1)
    near = tl.fma(z * a, p, a)
    size = tl.abs(a)
    far = 1.0 - 2.0 / (exp(tl.minimum(2.0 * size, 80.0)) + 1.0)
    return tl.where(size < TANH_SERIES_UP_TO, near, tl.where(a < 0.0, -far, far))


@triton.jit
def activate(l, MULTIPLIER: tl.constexpr, CAP: tl.constexpr):
    """Apply logit multiplier and soft-cap to clean logits; ``CAP`` 0 means none."""
    x = l
    if MULTIPLIER != 1.0:
        x = tl.minimum(tl.maximum(x * MULTIPLIER, -FLOAT32_MAX), FLOAT32_MAX)
    if CAP != 0.0:
        x = CAP * tanh(x / CAP)
    return x


@triton.jit
def sigmoid(x, shift):
    """Compute the logistic function of x, times e**-shift, for a shift between the row's maximum and 0."""
    return exp(tl.minimum(x, 0.0) - shift) / (1.0 + exp(-tl.abs(x)))


@triton.jit
def sqrtsoftplus(x, shift):
    """Return sqrt(log(1 + e**x)) e**(-shift / 2), for a shift between the row's maximum and 0."""
    softplus = tl.maximum(x, 0.0) + log1p(exp(-tl.abs(x)))
    plain = tl.sqrt(softplus) * exp(tl.maximum(shift, SOFTPLUS_IS_EXP) * -0.5)
    return tl.where(x < SOFTPLUS_IS_EXP, exp(tl.minimum(x - shift, 0.0) * 0.5), plain)


@triton.jit
def tree_sum(v, ROWS: tl.constexpr, N: tl.constexpr):
    """Sum ``v [ROWS, N]`` over N, a power of two, neighbours first: sums of two do not depend on any layout.

    Zeros behind the last element change nothing, so neither does the padding of N.
    """
    for halvings in tl.static_range(1, 12):
        if N >> halvings:
            v = tl.sum(tl.reshape(v, [ROWS, N >> halvings, 2]), axis=2)
    return tl.reshape(v, [ROWS])


@triton.jit
def selected_weights(
    x, is_selected, highest, total, SCORE: tl.constexpr, RENORMALIZE: tl.constexpr, EPSILON: tl.constexpr,
    FLOOR: tl.constexpr, SCALE: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Return the weights of the selected ``x [ROWS, N]``; ``highest``, ``total``: the row's softmax statistics."""
    EXACT: tl.constexpr = RENORMALIZE and EPSILON == 0.0 and FLOOR == 0.0
    x = tl.where(is_selected, x, -FLOAT32_MAX)
    best = tl.max(x, axis=1)[:, None]
    if SCORE == "softmax":
        if EXACT:
            v = exp(x - best)
        else:
            v = exp(x - highest[:, None]) / total[:, None]
    else:
        shift = tl.minimum(best, 0.0) if EXACT else best * 0.0
        if SCORE == "sigmoid":
            v = sigmoid(x, shift)
        else:
            v = sqrtsoftplus(x, shift)
    v = tl.where(is_selected, v, 0.0)
    if RENORMALIZE:
        denominator = tree_sum(v, ROWS, N)
        if EPSILON != 0.0:
            denominator = denominator + EPSILON
        if FLOOR != 0.0:
            denominator = tl.maximum(denominator, FLOOR)
        denominator = denominator[:, None]
        v = tl.where(denominator == 0.0, 1.0 / K, v / denominator)
    return v * SCALE if SCALE != 1.0 else v
