r"""The float64 oracle of ``gate``, and how far its logits may be from the exact ones.

With ``u = 2**-24``, the unit roundoff of float32, and t the H terms of a logit, an implementation
in float32 is allowed, to first order:

**A term** is a product of up to six factors: hidden state, norm, norm weight, input scale,
multiplier, router weight. Each multiplication rounds, and the multiplier itself: ``products * u *
sum|t|``.

**The sum** of H terms in any order errs by no more than ``4 sqrt(H) u sum|t|``, roundings being as
good as independent (``error_bounds`` has the source). Matrix units cut numbers off instead, which
is no accident that averages out: once in 16 terms, by at most ``2 u`` of the sum, so ``H / 8 * u``
more. Neither is more than ``2 (H - 1) u``, an error of two roundings in each addition.

**The norm** is ``1 / sqrt(mean(x**2) + eps)``: the sum of positive numbers as above, a rounding for
the squares, the division and eps each, half of all that for the root, and two units in the last
place, 4 u, for a reciprocal root.

**The bias** is one more term, for it may be what the sum begins with. **The last rounding** is ``u
|l|``.

**Underflow**: each of the products may lose what is below ``2**-126``, a subnormal number, before
the other factors multiply it.

Rounding to bfloat16 or float16 is monotonic. So the least and the greatest right logit in those
dtypes are what the two ends of the float32 bound are rounded to; both are infinite where the dtype
has no number so large. A result below the dtype's normal range may be flushed to zero.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from moe_routing.reference import oracle
from moe_routing.reference.error_bounds import FAST_DIVISION, FLUSHED, SUMMATION_LAMBDA, U

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.gating.kernel import GateOutput, Projection
    from moe_routing_registry import RoutingSpec

TRUNCATED_EVERY = 16
"""Terms that a matrix unit adds before it cuts off."""
MANY = 5
"""After this many wrong logits nothing new is learnt."""


def gate(
    spec: RoutingSpec,
    projection: Projection,
    topk: int,
    **operands: object,  # those of `oracle.route`
) -> tuple[Tensor, Tensor, Tensor]:
    """Return float64 weights, int64 ids and float64 logits, by the definition.

    Assumes arguments that ``Gate`` would accept; it checks none of them. Autograd through it is the
    reference for gradients.
    """
    exact = logits(projection)
    weights, ids = oracle.route(spec, exact, topk, **operands)  # type: ignore[arg-type] # as its own
    return weights, ids, exact


def logits(projection: Projection) -> Tensor:
    """Return the float64 logits ``[T, E]``.

    >>> from moe_routing.gating import Projection
    >>> hidden, weight = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    >>> logits(Projection(hidden, weight, multiplier=2.0)).tolist()
    [[6.0, 14.0]]
    """
    exact = _inputs(projection) @ projection.router_weight.double().t()
    bias = projection.router_bias
    return exact if bias is None else exact + bias.double()


def _inputs(projection: Projection) -> Tensor:
    x = projection.hidden.double()
    inputs = x
    if projection.eps is not None:
        inputs = x / (x.pow(2).mean(-1, keepdim=True) + projection.eps).sqrt()
    if projection.norm_weight is not None:
        inputs = inputs * projection.norm_weight.double()
    if projection.input_scale is not None:
        inputs = inputs * projection.input_scale.double()
    return inputs * projection.multiplier


class Between(NamedTuple):
    """The exact logits and the least and greatest right ones, all float64 ``[T, E]``."""

    exact: Tensor
    least: Tensor
    greatest: Tensor


@torch.no_grad()
def bounds(projection: Projection, dtype: torch.dtype) -> Between:
    """Return between what the logits may lie, which the text above derives.

    :param dtype: what the logits are rounded to at the end.

    >>> from moe_routing.gating import Projection
    >>> found = bounds(Projection(torch.full((1, 1), 300.0), torch.full((1, 1), 300.0)), torch.half)
    >>> found.exact.item(), found.least.item(), found.greatest.item()
    (90000.0, inf, inf)
    """
    hidden, weight, bias, norm_weight, input_scale, eps, multiplier = projection
    exact, columns = logits(projection), hidden.shape[1]
    additions = _additions(columns + (bias is not None))
    optional = (norm_weight, input_scale)
    relative = additions + sum(factor is not None for factor in optional) + 1
    relative += 2 * (multiplier != 1.0)
    if eps is not None:
        relative += 1 + (additions + 3) / 2 + FAST_DIVISION
    magnitudes = _inputs(projection).abs() @ weight.double().abs().t()
    if bias is not None:
        magnitudes += bias.double().abs()
    error = U * (relative * magnitudes + exact.abs()) + _flushed(projection)
    least, greatest = exact - error, exact + error
    if dtype == torch.float32:
        return Between(exact, least, greatest)
    flushed = torch.finfo(dtype).smallest_normal
    rounded = [end.float().to(dtype).double() for end in (least - flushed, greatest + flushed)]
    return Between(exact, *rounded)


def _additions(terms: int) -> float:
    """Return how many roundings of the sum of magnitudes a sum may be off by."""
    accidental = SUMMATION_LAMBDA * math.sqrt(terms) + 2 * terms / TRUNCATED_EVERY
    return min(2.0 * (terms - 1), accidental)


def _flushed(projection: Projection) -> Tensor:
    """Return what products lose that are below float32's normal range, ``[T, 1]``."""
    x, weight, eps = projection.hidden.double(), projection.router_weight.double(), projection.eps
    most = 1 + weight.abs().amax() if weight.numel() else weight.new_ones(())
    for factor in (projection.norm_weight, projection.input_scale):
        if factor is not None:
            most = most * (1 + factor.double().abs().amax())
    most = most * (1 + abs(projection.multiplier))
    if eps is None:
        return most * x.shape[1] * FLUSHED * torch.ones(x.shape[0], 1, device=x.device)
    squares = x.pow(2).mean(-1, keepdim=True) + eps
    # A flushed square moves the norm, and so each logit, by a share of itself.
    share = FLUSHED / squares
    magnitude = (x.abs() / squares.sqrt()).sum(-1, keepdim=True)
    return most * (x.shape[1] * FLUSHED * (1 + squares.rsqrt()) + share * magnitude)


def logits_problems(projection: Projection, made: Tensor) -> list[str]:
    """Say which logits are further from the exact ones than their bound allows.

    Logits of rows that are not finite or leave float32's range are not compared: they have no
    stated value.
    """
    exact, least, greatest = bounds(projection, made.dtype)
    stated = exact.isfinite() & in_range(projection)
    values = made.double()
    wrong = ~((least <= values) & (values <= greatest))  # NaN is wrong
    return [
        f"row {row}: the logit of expert {expert} is {float(made[row, expert]):.9g}, exactly "
        f"{float(exact[row, expert]):.9g}; right are {float(least[row, expert]):.9g} to "
        f"{float(greatest[row, expert]):.9g}"
        for row, expert in (wrong & stated).nonzero()[:MANY].tolist()
    ]


def in_range(projection: Projection) -> Tensor:
    """Tell for which rows ``[T, 1]`` no step of float32 arithmetic leaves its range.

    In whatever order the factors are multiplied; the square of a row without a norm is not taken.
    """
    x, weight = projection.hidden.double(), projection.router_weight.double()
    most = x.abs().amax(-1, keepdim=True).clamp(min=1.0)
    for factor in (projection.norm_weight, projection.input_scale):
        if factor is not None:
            most = most * factor.double().abs().amax().clamp(min=1.0)
    most = most * max(1.0, abs(projection.multiplier))
    terms = most * weight.abs().amax().clamp(min=1.0) * x.shape[1]
    if projection.eps is not None:
        terms = terms.maximum(x.pow(2).sum(-1, keepdim=True))
        terms = terms * (x.pow(2).mean(-1, keepdim=True) + projection.eps).rsqrt().clamp(min=1.0)
    return terms < oracle.FLOAT32_MAX


def output_problems(
    spec: RoutingSpec, projection: Projection, topk: int, made: GateOutput, **operands: object
) -> list[str]:
    """Say what is wrong with the output of a call.

    The logits must be within their bound, and weights and ids right for the logits that came. So a
    selection is right within what the bound allows, and exact given the logits.
    """
    from moe_routing.kernel import RoutingOutput
    from moe_routing.reference.compare import compare

    routed = RoutingOutput(made.weights, made.ids)
    found = compare(spec, made.logits.detach(), topk, routed, **operands)  # type: ignore[arg-type] # as its own
    return [*logits_problems(projection, made.logits.detach()), *found.problems]
