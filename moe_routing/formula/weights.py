"""The weights of the selected experts, in float32, with the same bits whatever the number of rows.

Only operations whose result for an element does not depend on its place in the tensor are used:
PyTorch's ``exp``, ``log1p`` and ``softmax`` over the last dimension are such on the CPU, its
``sigmoid`` (another polynomial for the last few elements) and its ``sum`` (another order for other
shapes) are not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moe_routing.formula.select import FLOAT32_MAX, in_pieces

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.formula.select import Replay
    from moe_routing_registry import RoutingSpec

_SOFTPLUS_IS_EXP = -17.0
"""Below it log1p(exp(x)) is exp(x) to within 1e-8 of itself, half a float32 rounding step."""
_SUMMED_UP_TO = 256
"""Terms up to which PyTorch's softmax on the CPU sums within the contract's 2e-6.

It adds every eighth to the same float32.
"""


def activated(spec: RoutingSpec, l: Tensor) -> Tensor:
    """Apply the logit multiplier and the soft-cap; the result is finite.

    On the CPU in float64: near a cap of 30 one rounding step of float32 is 2e-6, which an
    exponential turns into an error of 2e-6 in the weight. Not every accelerator has float64.
    """
    if l.device.type == "cpu" and (spec.logit_multiplier != 1.0 or spec.logit_softcap is not None):
        l = l.to(torch.float64)
    if spec.logit_multiplier != 1.0:
        l = (l * spec.logit_multiplier).clamp_(-FLOAT32_MAX, FLOAT32_MAX)
    if spec.logit_softcap is not None:
        l = (l / spec.logit_softcap).tanh_().mul_(spec.logit_softcap)
    return l


def score(spec: RoutingSpec, x: Tensor) -> Tensor:
    """Score every expert of every row, for a selection that adds a bias."""
    if spec.score == "softmax":
        return x.softmax(-1)
    if spec.score == "sigmoid":
        return x.neg().exp_().add_(1.0).reciprocal_()
    return _softplus(x).sqrt_()


def selected_weights(
    spec: RoutingSpec, x: Tensor, ids: list[Tensor], absent: Tensor | None = None
) -> list[Tensor]:
    """Compute the selected experts' float32 weights, renormalised and scaled as the spec says.

    :param ids: ``[T, K]`` whole, or K columns ``[T, 1]``; the weights come likewise.
    :param absent: tells which slots ``[T, K]`` have no expert: their weight is 0, and no sum
        counts them.
    """
    exact_ratio = spec.renormalize and not (spec.renorm_epsilon or spec.renorm_floor)
    total = None
    if spec.score == "softmax":
        if spec.renormalize and not exact_ratio:
            weights, total = _softmax_and_sum(spec, x, ids, absent)
        else:
            weights = _softmax(x, ids, absent, of_selected=exact_ratio)
    else:
        chosen = [x.gather(-1, i) for i in ids]
        if absent is not None:
            chosen = _without(chosen, absent)
        # A common factor exp(-shift) cancels in the ratio, and keeps the largest term away from
        # underflow.
        shift = (
            _highest(chosen).clamp_(max=0.0) if exact_ratio else torch.zeros_like(chosen[0][:, :1])
        )
        of = _sigmoid if spec.score == "sigmoid" else _sqrtsoftplus
        weights = [of(c, shift) for c in chosen]
    if spec.renormalize and spec.score != "softmax":
        total = _sum_in_order(weights) + spec.renorm_epsilon
        if spec.renorm_floor:
            total = total.clamp_(min=spec.renorm_floor)
    for n, w in enumerate(weights):
        renormalized = w if total is None else w / total
        weights[n] = (renormalized if spec.scale == 1.0 else renormalized * spec.scale).float()
    return weights


def _without(chosen: list[Tensor], absent: Tensor) -> list[Tensor]:
    """Return the activated logits of the selected; -inf, of which every score is 0, for none."""
    pieces = in_pieces(absent, len(chosen))
    return [c.masked_fill(a, -torch.inf) for c, a in zip(chosen, pieces, strict=True)]


def _softmax(
    x: Tensor, ids: list[Tensor], absent: Tensor | None, *, of_selected: bool
) -> list[Tensor]:
    """Return the softmax over all experts, or over those selected, at the selected."""
    if len(ids) == 1:
        shared = x.gather(-1, ids[0]) if of_selected else x
        if absent is not None and of_selected:
            shared = shared.masked_fill(absent, -torch.inf)
        if shared.shape[-1] > _SUMMED_UP_TO and x.device.type == "cpu":
            shared = shared.to(torch.float64)
        shared = shared.softmax(-1)
        if of_selected:
            return [shared]
        weights = shared.gather(-1, ids[0])
        return [weights if absent is None else weights.masked_fill(absent, 0.0)]
    chosen = [x.gather(-1, i) for i in ids]
    if absent is not None:
        chosen = _without(chosen, absent)
    highest = _highest(chosen) if of_selected else x.amax(-1, keepdim=True)
    powers = [(c - highest).exp_() for c in chosen]
    total = _sum_in_order(powers) if of_selected else (x - highest).exp_().sum(-1, keepdim=True)
    return [p / total for p in powers]


def _softmax_and_sum(
    spec: RoutingSpec, x: Tensor, ids: list[Tensor], absent: Tensor | None
) -> tuple[list[Tensor], Tensor]:
    """Return a multiple of the softmax over all experts at the selected, and of what divides it.

    That is their sum and epsilon, or the floor. The multiple is 1 for the best of the selected: a
    float32 difference to the best of the row may be off by 2e-6 of what its exponential is, which
    the division would pass on where all of the selected are far below.
    """
    chosen = [x.gather(-1, i) for i in ids]
    if absent is not None:
        chosen = _without(chosen, absent)
    best, highest = _highest(chosen).clamp(min=-FLOAT32_MAX), x.amax(-1, keepdim=True)
    powers = [(c - best).exp_() for c in chosen]
    # What the softmax has for the best: e**(best - highest) / sum. ``lost`` is what the rounding of
    # the difference lost (Knuth's exact sum of two numbers).
    below = best - highest
    back = below - best
    lost = (best - (below - back)) - (highest + back)
    # Further below, the exponential is 0, and what was lost may be any number.
    lost = lost.where(below > -128.0, 0.0)  # noqa: PLR2004 -- e**-128 is less than any float32
    summed = x.to(torch.float64) if x.device.type == "cpu" else x
    share = below.exp() * (1.0 + lost) * summed.softmax(-1).amax(-1, keepdim=True)
    total = _sum_in_order(powers)
    if spec.renorm_epsilon:
        total = total + spec.renorm_epsilon / share
    return powers, total.maximum(spec.renorm_floor / share) if spec.renorm_floor else total


def _highest(parts: list[Tensor]) -> Tensor:
    highest = parts[0].amax(-1, keepdim=True)
    for part in parts[1:]:
        highest = highest.maximum(part)
    return highest


def _sum_in_order(parts: list[Tensor]) -> Tensor:
    """Add the K columns from the first to the last, with the same bits whatever T is.

    On the CPU ``cumsum`` does that in one call, and in double precision. On CUDA it is a scan whose
    order depends on the shape (T = 1 and T = 67 differ by a unit in the last place on an H200), so
    there each addition is written out.
    """
    if len(parts) == 1:
        if parts[0].device.type == "cpu":
            return parts[0].cumsum(-1)[:, -1:]
        parts = list(parts[0].split(1, dim=-1))
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _sigmoid(x: Tensor, shift: Tensor) -> Tensor:
    """Return sigmoid(x) * exp(-shift), for a shift between the row's maximum and 0."""
    return (x.clamp(max=0.0) - shift).exp_().div_(x.abs().neg_().exp_().add_(1.0))


def _softplus(x: Tensor) -> Tensor:
    return x.abs().neg_().exp_().log1p_().add_(x.clamp(min=0.0))


def _sqrtsoftplus(x: Tensor, shift: Tensor) -> Tensor:
    """Return sqrt(softplus(x)) * exp(-shift / 2), for a shift between the row's maximum and 0."""
    # Where x is above the bound so is the shift, because x is at most the row's maximum: nothing
    # overflows.
    plain = _softplus(x).sqrt_() * (shift.clamp(min=_SOFTPLUS_IS_EXP) * -0.5).exp_()
    return torch.where(x < _SOFTPLUS_IS_EXP, ((x - shift) * 0.5).exp_(), plain)


def sparsemixer(
    spec: RoutingSpec, l: Tensor, topk: int, replayed: Replay | None = None
) -> tuple[Tensor, Tensor]:
    """Run K rounds of argmax, each with a softmax over the entries near its maximum (Phi-MoE).

    :param replayed: a recorded expert takes the place of the round's maximum; a slot without one
        strikes nothing out.
    """
    left = l.clone()
    weights, ids = [], []
    for k in range(topk):
        # `max` returns the first of equal maxima on the CPU only, so the id is the smallest that
        # holds the maximum.
        best = left.amax(-1, keepdim=True)
        places = torch.arange(l.shape[-1], device=l.device).expand_as(l)
        chosen = places.masked_fill(left != best, l.shape[-1]).amin(-1, keepdim=True)
        far = (best - l) / l.abs().maximum(best) > 2 * spec.jitter
        near = left.masked_fill(far, -torch.inf)
        if near.shape[-1] > _SUMMED_UP_TO and near.device.type == "cpu":
            near = near.to(torch.float64)
        struck: Tensor | float = -torch.inf
        if replayed is not None:
            chosen = replayed.ids[:, k : k + 1].where(replayed.given, chosen)
            absent = replayed.absent[:, k : k + 1]
            struck = torch.where(absent, left.gather(-1, chosen), -torch.inf)
        weights.append(near.softmax(-1).gather(-1, chosen))
        ids.append(chosen)
        left = left.scatter(-1, chosen, struck)
    return (torch.cat(weights, -1) * spec.scale).float(), torch.cat(ids, -1)
