r"""How far float32 may stray from the exact score: the derivation of the error bound.

Write ``u = 2**-24`` for the unit roundoff of float32. What a backend is allowed, operation by
operation:

====================  ==========
==================================================================== operation             error
why ====================  ==========
==================================================================== ``+ - *``             ``u``
IEEE 754, rounded to nearest ``/``, ``sqrt``       ``4 u``     2 units in the last place: the fast
divisions of GPU compilers ``exp2``              ``4 u``     2 units in the last place:
``ex2.approx`` and its like on other GPUs ``log1p``, ``tanh``   ``8 u``     4 units in the last
place subnormals            ``2**-126`` may be flushed to zero ====================  ==========
====================================================================

Everything else follows by first-order error propagation; nothing in it is fitted to a backend.

**exp(d)**, computed as ``exp2(d * log2(e))``: rounding ``d``, the constant and the product each
move the exponent by ``|d| u``, hence the relative error is ``(3 |d| + 4) u``.

**sigmoid**, ``1 / (1 + exp(-x))`` or ``exp(x) / (1 + exp(x))``: an error of the exponential counts
with the factor ``1 - s`` (the derivative of log s with respect to log exp), then one addition and
one division: ``(1 - s) (3 |x| + 4) u + 5 u``.

**sqrtsoftplus**, with ``e = exp(-|x|)``: ``softplus = max(x, 0) + log1p(e)``, and the derivative of
``log1p`` is at most 1, so its absolute error is ``e (3 |x| + 4) u + 8 u softplus``. The root halves
relative errors and adds its own: ``(e (3 |x| + 4) / softplus + 8) u / 2 + 4 u``. Where softplus is
subnormal it may be flushed to zero before the root is taken, and the score with it.

**softmax**, ``exp(x - m) / Z``: the numerator as above with ``d = x - m``. The terms of ``Z`` are
weighted by the probabilities ``p``, so their errors add up to ``sum(p (3 |d| + 4)) u``. Summing E
positive terms in any order errs by at most ``(E - 1) u`` and, roundings being as good as
independent, by no more than ``4 sqrt(E) u`` but once in a thousand rows at worst (Higham and Mary,
A New Approach to Probabilistic Rounding Error Analysis, 2019, with lambda = 4); the smaller counts.
Then one division: ``(3 |d| + 4 + sum(p (3 |d| + 4)) + min(E - 1, 4 sqrt(E)) + 4) u``.

**logit multiplier and soft-cap** move ``x`` itself before any of this: the product by ``2 u |x|``
(the constant is rounded too), and ``cap tanh(y / cap)`` by what the derivative ``1 - tanh^2``
passes on plus ``9 u |x|``.

**bias**: ``t = s + b`` is one rounding, ``u |t|``. So ``t`` may stray by ``error(s) + u |t| +
2**-126``, and a group's sum by those of its terms and ``u |sum|`` for each addition, in the order
that the contract states.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from moe_routing.reference import oracle

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing_registry import RoutingSpec

U = 2.0**-24
FAST_DIVISION = 4
EXP2 = 4
LOG1P = TANH = 8
FLUSHED = 2.0**-126
SUMMATION_LAMBDA = 4


def transform_error(spec: RoutingSpec, l: Tensor, x: Tensor) -> Tensor:
    """Return the absolute error ``[T, E]`` that multiplier and soft-cap may have left in ``x``."""
    error = torch.zeros_like(x)
    if spec.logit_multiplier != 1.0:
        error = 2 * U * (l * spec.logit_multiplier).abs().clamp(max=oracle.FLOAT32_MAX)
    if spec.logit_softcap is not None:
        slope = 1 - (x / spec.logit_softcap).square()
        inside = (l * spec.logit_multiplier).abs()
        passed_on = torch.where(slope > 0, slope * (error + FAST_DIVISION * U * inside), 0.0)
        error = passed_on + (TANH + 1) * U * x.abs()
    return error


def score_error(spec: RoutingSpec, l: Tensor) -> Tensor:
    """Return the relative error ``[T, E]`` of the score that a float32 evaluation may have."""
    x = oracle.transformed(spec, l)
    moved = transform_error(spec, l, x)
    if spec.score == "softmax":
        d = x.amax(-1, keepdim=True) - x
        exponential = (3 * d + EXP2) * U + moved
        p = torch.softmax(x, dim=-1)
        # Where p underflows, d may be 1e38: such terms weigh nothing.
        denominator = torch.where(p > 0, p * exponential, 0.0).sum(-1, keepdim=True)
        summation = min(x.shape[1] - 1, SUMMATION_LAMBDA * math.sqrt(x.shape[1]))
        return exponential + denominator + (summation + FAST_DIVISION) * U
    exponential = (3 * x.abs() + EXP2) * U
    if spec.score == "sigmoid":
        return torch.sigmoid(-x) * (exponential + moved) + (1 + FAST_DIVISION) * U
    softplus = torch.nn.functional.softplus(x, threshold=1000.0).clamp(
        min=torch.finfo(torch.float64).tiny
    )
    small = (-x.abs()).exp()
    # d log softplus / dx is below 1 for x < 0.
    slope = torch.where(x < 0, 1.0, torch.sigmoid(x) / softplus)
    relative = (small * exponential / softplus + LOG1P * U + slope * moved) / 2 + FAST_DIVISION * U
    return torch.where(softplus < 2 * FLUSHED, 1.0, relative)


def _absolute_score_error(spec: RoutingSpec, l: Tensor, x: Tensor) -> Tensor:
    # Beyond |log s| = 100 a score is below 2**-126, whatever relative error the formula gives it.
    relative = score_error(spec, l).clamp(max=1.0)
    return oracle.log_scores(spec, x).clamp(min=-700.0).exp() * relative


def judged_error(spec: RoutingSpec, logits: Tensor, keys: Tensor) -> Tensor:
    """Return the absolute error ``[T, E]`` that float32 may make in what groups are judged by."""
    if spec.group_by == "selection":
        return key_error(spec, logits, keys)
    l = oracle.clean(logits)
    return _absolute_score_error(spec, l, oracle.transformed(spec, l)) + FLUSHED


def key_error(spec: RoutingSpec, logits: Tensor, keys: Tensor) -> Tensor:
    """Return the absolute error ``[T, E]`` that float32 may make in the selection keys.

    It is 0 where selection is on logits.
    """
    if not spec.needs_bias:
        return torch.zeros_like(keys)
    l = oracle.clean(logits)
    x = oracle.transformed(spec, l)
    if spec.selection == "logits_plus_bias":
        base_error = transform_error(spec, l, x)
    else:
        base_error = _absolute_score_error(spec, l, x)
    return base_error + U * keys.abs() + FLUSHED


def weight_error(spec: RoutingSpec, logits: Tensor, ids: Tensor) -> Tensor:
    """Return the relative error ``[T, K]`` of the weights that multiplier and soft-cap cause.

    0 without them.

    The contract's tolerance is about computing weights from ``x``; where ``x`` itself is a rounded
    float32, no arithmetic on it can be closer than what its rounding moves. Unnormalised softmax
    passes on the error of its own exponent and the mean of all, every other score at most that of
    its own; a renormalisation adds the selected' largest.
    """
    l = oracle.clean(logits)
    x = oracle.transformed(spec, l)
    moved = transform_error(spec, l, x)
    own = moved.gather(1, ids)
    if spec.renormalize:
        return own + own.amax(-1, keepdim=True)
    if spec.score == "softmax":
        p = torch.softmax(x, dim=-1)
        return own + torch.where(p > 0, p * moved, 0.0).sum(-1, keepdim=True)
    return own
