"""The float maths that all variants share: activation, scores, weights.

A row's bits must not depend on the variant that its batch picked, so every sum here has one fixed
shape, ``tree_sum``, kernels are compiled without fused multiply-adds that the compiler invents, and
there is one copy of each formula.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from moe_routing_backends.triton.device.keys import FLOAT32_MAX, INTERPRETED, at_least, clean

LOG2E_HIGH = tl.constexpr(1.4426950216293335)
"""log2(e) rounded to float32; LOW is the rest."""
LOG2E_LOW = tl.constexpr(1.9259629911266175e-08)
LN2 = tl.constexpr(0.6931471805599453)
UNDERFLOW = tl.constexpr(-150.0)
"""exp of it is 0 in float32.

A bound below which nothing need be told apart keeps inf - inf out of ``exp``.
"""
SOFTPLUS_IS_EXP = tl.constexpr(-17.0)
"""Below it log(1 + e^x) is e^x to within half a rounding step of float32."""
TANH_SERIES_UP_TO = tl.constexpr(0.625)


@triton.jit
def exp(d):
    """Return e**d for d <= 88 to about 2 ulp.

    2**y is exact in y's integer part, so the error is that of y = d log2(e); its rounding error r
    is computed by a fused multiply-add and put back as 2**(y + r) = 2**y (1 + r ln 2). The
    interpreter fuses nothing, so that r would be 0.
    """
    d = tl.maximum(d, UNDERFLOW)
    if INTERPRETED:
        return tl.math.exp(d)
    else:
        y = d * LOG2E_HIGH
        r = tl.fma(d, LOG2E_LOW, tl.fma(d, LOG2E_HIGH, -y))
        e = tl.math.exp2(y)
        return tl.fma(e * LN2, r, e)


@triton.jit
def exp_of_many(d):
    """Return e**d for d <= 0 with one rounding less cared for.

    It is for sums, where a term's error counts by its share.
    """
    return tl.math.exp2(d * LOG2E_HIGH)


@triton.jit
def log1p(e):
    """Compute the logarithm of 1 + e for 0 <= e <= 1 to 3 units of 2**-24.

    It is e + e**2 q(e), with a minimax polynomial q.
    """
    q = tl.fma(e, 0.005364826414734125, -0.03006580099463463)
    q = tl.fma(e, q, 0.07920455187559128)
    q = tl.fma(e, q, -0.13753803074359894)
    q = tl.fma(e, q, 0.1915365606546402)
    q = tl.fma(e, q, -0.24857163429260254)
    q = tl.fma(e, q, 0.3332132399082184)
    q = tl.fma(e, q, -0.49999648332595825)
    return tl.fma(e * e, q, e)


@triton.jit
def tanh(a):
    """Compute the hyperbolic tangent.

    The minimax polynomial of the Cephes library near 0, 1 - 2 / (e**2|a| + 1) elsewhere.
    """
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
def activate(l, SPEC: tl.constexpr):
    """Apply the logit multiplier and the soft-cap to clean logits; a soft-cap of 0 means none."""
    MULTIPLIER: tl.constexpr = SPEC.value.logit_multiplier
    CAP: tl.constexpr = SPEC.value.logit_softcap
    x = l
    if MULTIPLIER != 1.0:
        x = tl.minimum(tl.maximum(x * MULTIPLIER, -FLOAT32_MAX), FLOAT32_MAX)
    if CAP != 0.0:
        x = CAP * tanh(x / CAP)
    return x


@triton.jit
def sigmoid(x, shift):
    """Compute the logistic function of x, times e**-shift.

    The shift is between the row's maximum and 0.
    """
    return exp(tl.minimum(x, 0.0) - shift) / (1.0 + exp(-tl.abs(x)))


@triton.jit
def sqrtsoftplus(x, shift):
    """Return sqrt(log(1 + e**x)) e**(-shift / 2), for a shift between the row's maximum and 0."""
    softplus = tl.maximum(x, 0.0) + log1p(exp(-tl.abs(x)))
    plain = tl.sqrt(softplus) * exp(tl.maximum(shift, SOFTPLUS_IS_EXP) * -0.5)
    return tl.where(x < SOFTPLUS_IS_EXP, exp(tl.minimum(x - shift, 0.0) * 0.5), plain)


@triton.jit
def log_slope(x, SCORE: tl.constexpr):
    """Return the derivative of log(score(x)).

    1 for softmax, whose denominator is treated elsewhere.
    """
    if SCORE == "sigmoid":
        return sigmoid(-x, 0.0)
    elif SCORE == "sqrtsoftplus":
        softplus = tl.maximum(x, 0.0) + log1p(exp(-tl.abs(x)))
        # There it is e**x to within float32, and the slope of its logarithm 1.
        tiny = x < SOFTPLUS_IS_EXP
        return 0.5 * tl.where(tiny, 1.0, sigmoid(x, 0.0) / tl.where(tiny, 1.0, softplus))
    else:
        return x * 0.0 + 1.0


@triton.jit
def reciprocal(d):
    """Return 1 / d for d >= 1 within 2 units in the last place.

    Where that is below 2**-126 it may be 0.
    """
    if INTERPRETED:
        return 1.0 / d
    else:
        return libdevice.fast_dividef(1.0, d)


@triton.jit
def selection_bias(b, SPEC: tl.constexpr):
    """Widen a bias to float32.

    A clean bias and a score from 0 to 2**64 have a clean sum, so scores need no more care.
    """
    SELECTION: tl.constexpr = SPEC.value.selection
    b = b.to(tl.float32)
    return clean(b) if SELECTION == "scores_plus_bias" else b


@triton.jit
def selection_score(raw, b, highest, share, SPEC: tl.constexpr):
    """Return the float32 that selection looks at, never -0 where a score is added to a bias.

    This is done for every expert, so a score is only as exact as the contract asks
    (``moe_routing/reference/error_bounds.py``): weights are computed from the selected logits by
    other, longer ways.

    :param b: ``selection_bias``.
    :param highest, share: the row's highest logit and 1 / sum(e**(x - highest)), for softmax
        scores.
    """
    SELECTION: tl.constexpr = SPEC.value.selection
    SCORE: tl.constexpr = SPEC.value.score
    MULTIPLIER: tl.constexpr = SPEC.value.logit_multiplier
    CAP: tl.constexpr = SPEC.value.logit_softcap
    PLAIN: tl.constexpr = MULTIPLIER == 1.0 and CAP == 0.0
    if SELECTION == "logits":
        t = clean(raw)
    elif SELECTION == "logits_plus_bias":
        t = clean(activate(clean(raw), SPEC) + b)
    elif SCORE == "softmax":
        t = exp_of_many(activate(clean(raw), SPEC) - highest) * share + b
    elif SCORE == "sigmoid":
        # Infinities give 0 and 1 as the largest finite numbers do, and NaN gives NaN, to be counted
        # as -inf's 0.
        x = raw.to(tl.float32) if PLAIN else activate(clean(raw), SPEC)
        t = at_least(reciprocal(1.0 + tl.math.exp2(x * -LOG2E_HIGH)), 0.0) + b
    else:
        x = activate(clean(raw), SPEC)
        t = tl.sqrt(tl.maximum(x, 0.0) + log1p(tl.math.exp2(-tl.abs(x) * LOG2E_HIGH))) + b
    return t


@triton.jit
def tree_sum(v):
    """Sum ``v [ROWS, N]`` over N, a power of two, neighbours first.

    Sums of two do not depend on any layout.

    Zeros past the last element change nothing, so neither does the padding of N.
    """
    ROWS: tl.constexpr = v.shape[0]
    N: tl.constexpr = v.shape[1]
    for halvings in tl.static_range(1, 12):
        if N >> halvings:
            # A sum of two has one order only; one sum over N would have that of the layout.
            v = tl.sum(tl.reshape(v, [ROWS, N >> halvings, 2]), axis=2)
    return tl.reshape(v, [ROWS])


@triton.jit
def share_of_best(best, highest, total):
    """Return what a row's softmax has for the best of the selected: e**(best - highest) / total.

    The numerators are powers of the differences to that best, not to the row's highest: where all
    of the selected are far below it, the rounding of those would reach the ratio. What the rounding
    of this one difference loses is put back (Knuth's exact sum of two numbers).
    """
    below = best - highest
    back = below - best
    lost = (best - (below - back)) - (highest + back)
    # Further below, the exponential is 0, and what was lost may be any number.
    return exp(below) * (1.0 + tl.where(below > -128.0, lost, 0.0)) / total


@triton.jit
def selected_weights(x, is_selected, highest, total, SPEC: tl.constexpr, SCALE: tl.constexpr):
    """Return the weights of the selected ``x [ROWS, N]``, times ``SCALE``.

    :param highest, total: the row's softmax statistics.
    """
    SCORE: tl.constexpr = SPEC.value.score
    EXACT: tl.constexpr = SPEC.value.sums_to_one
    EPSILON: tl.constexpr = SPEC.value.renorm_epsilon
    FLOOR: tl.constexpr = SPEC.value.renorm_floor
    K: tl.constexpr = SPEC.value.topk
    x = tl.where(is_selected, x, -FLOAT32_MAX)
    best = tl.max(x, axis=1)[:, None]
    RENORMALIZE: tl.constexpr = SPEC.value.renormalize
    if SCORE == "softmax":
        if RENORMALIZE:
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
        denominator = tree_sum(v)
        epsilon = EPSILON
        floor = FLOOR
        if SCORE == "softmax" and not EXACT:
            share = share_of_best(tl.reshape(best, highest.shape), highest, total)
            epsilon = EPSILON / share
            floor = FLOOR / share
        if EPSILON != 0.0:
            denominator = denominator + epsilon
        if FLOOR != 0.0:
            denominator = tl.maximum(denominator, floor)
        denominator = denominator[:, None]
        v = tl.where(denominator == 0.0, 1.0 / K, v / denominator)
    return v * SCALE if SCALE != 1.0 else v
