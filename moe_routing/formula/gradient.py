"""The gradient of the weights in closed form; selection itself has none.

One implementation for every backend that brings no kernel of its own. Below, ``w = scale *
per_expert_scale[ids] * u``, ``u = v / D`` where renormalised, ``v = score(x)[ids]``, and ``x`` is
the activated logit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing_registry import RoutingSpec

_MAX = torch.finfo(torch.float32).max


def weights_backward(  # noqa: PLR0913 -- what a gradient depends on
    spec: RoutingSpec,
    grad_weights: Tensor,
    logits: Tensor,
    ids: Tensor,
    per_expert_scale: Tensor | None,
    *,
    absent: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``logits`` and of ``per_expert_scale``.

    The first has the logits' dtype, and is 0 at NaN and inf. The second is empty if there is no
    scale.

    Only operations that PyTorch can differentiate, and none in place: the derivatives of the
    gradient come out of them.

    :param grad_weights: ``[T, K]``, of the K selected experts.
    :param ids: ``[T, K]``, logical ids; -1 in rows of padding.
    :param absent: whether ids were recorded: then single slots may be -1 too, which no sum counts.
    """
    chosen, constant = ids.long().clamp(min=0), ids < 0
    # Rows of padding stay as they are: a ratio of no scores at all would be NaN.
    missing = constant & ~constant.all(-1, keepdim=True) if absent else None
    if spec.zero_experts:
        constant = constant | (ids >= logits.shape[1] - spec.zero_experts)
    grad = grad_u = grad_weights.float().masked_fill(constant, 0.0) * spec.scale
    if per_expert_scale is not None:
        # What is constant has gradient 0 though its scale is infinite, and 0 times infinity is not
        # 0.
        grad_u = grad * per_expert_scale.float()[chosen].masked_fill(constant, 0.0)
    l = torch.nan_to_num(logits.float(), nan=-_MAX, posinf=_MAX, neginf=-_MAX)
    if spec.selection == "sparsemixer":
        grad_x, u, slope = _sparsemixer(spec, grad_u, l, chosen, missing)
    else:
        x, slope = _activated(spec, l)
        grad_x, u = _scored(spec, grad_u, x, chosen, missing)
    grad_logits = (grad_x * slope).masked_fill(~logits.isfinite(), 0.0).to(logits.dtype)
    if per_expert_scale is None:
        return grad_logits, logits.new_empty(0)
    total = torch.zeros(per_expert_scale.shape, dtype=torch.float32, device=logits.device)
    total = total.index_add(0, chosen.reshape(-1), (grad * u).reshape(-1))
    return grad_logits, total.to(per_expert_scale.dtype)


def _activated(spec: RoutingSpec, l: Tensor) -> tuple[Tensor, Tensor]:
    """Return the activated logits and their derivative by the logits."""
    x = (l * spec.logit_multiplier).clamp(-_MAX, _MAX)
    slope = torch.full_like(l, spec.logit_multiplier)
    if spec.logit_softcap is not None:
        tanh = (x / spec.logit_softcap).tanh()
        x, slope = tanh * spec.logit_softcap, slope * (1 - tanh * tanh)
    return x, slope


def _scored(
    spec: RoutingSpec, grad_u: Tensor, x: Tensor, chosen: Tensor, missing: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Go back through renormalisation and score; return the gradient ``[T, E]`` of x, and u.

    :param missing: tells which slots have no expert, where some may have none.
    """
    exact_ratio = spec.renormalize and not (spec.renorm_epsilon or spec.renorm_floor)
    selected = x.gather(-1, chosen)
    if spec.score == "softmax" and not exact_ratio:
        p = x.softmax(-1)
        v = p.gather(-1, chosen)
        if missing is not None:
            v = v.masked_fill(missing, 0.0)
        grad_v, u = _renormalized(spec, grad_u, v)
        spread = -p * (grad_v * v).sum(-1, keepdim=True)
        return spread.scatter_add(-1, chosen, grad_v * v), u
    if exact_ratio:
        # A ratio of exact scores is a softmax over log scores.
        log_v, log_slope = _log_score(spec, selected)
        if missing is not None:
            log_v = log_v.masked_fill(missing, -torch.inf)
        u = log_v.softmax(-1)
        grad_selected = u * (grad_u - (grad_u * u).sum(-1, keepdim=True)) * log_slope
    else:
        log_v, log_slope = _log_score(spec, selected)
        v = log_v.exp()
        if missing is not None:
            v = v.masked_fill(missing, 0.0)
        grad_v, u = _renormalized(spec, grad_u, v)
        grad_selected = grad_v * v * log_slope
    return torch.zeros_like(x).scatter_add(-1, chosen, grad_selected), u


def _log_score(spec: RoutingSpec, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return log(score(x)) and its derivative.

    A constant that softmax drops is left out for ``softmax``.
    """
    if spec.score == "softmax":
        return x, torch.ones_like(x)
    log_sigmoid = torch.nn.functional.logsigmoid(x)
    if spec.score == "sigmoid":
        return log_sigmoid, (-x).sigmoid()
    softplus = -torch.nn.functional.logsigmoid(-x)
    # log(softplus(x)) is x, and its derivative 1, to within float32 where softplus underflows or is
    # about to.
    tiny = x < -17.0  # noqa: PLR2004 -- exp(-17) is 4e-8, less than a rounding step of float32
    safe = softplus.masked_fill(tiny, 1.0)
    log_v = 0.5 * torch.where(tiny, x, safe.log())
    return log_v, 0.5 * torch.where(tiny, torch.ones_like(x), x.sigmoid() / safe)


def _renormalized(spec: RoutingSpec, grad_u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of v through ``u = v / max(sum(v) + epsilon, floor)``, and u."""
    if not spec.renormalize:
        return grad_u, v
    total = v.sum(-1, keepdim=True) + spec.renorm_epsilon
    denominator = total.clamp(min=spec.renorm_floor) if spec.renorm_floor else total
    u = v / denominator
    through_sum = (grad_u * u).sum(-1, keepdim=True).masked_fill(total < spec.renorm_floor, 0.0)
    return (grad_u - through_sum) / denominator, u


def _sparsemixer(
    spec: RoutingSpec, grad_u: Tensor, l: Tensor, chosen: Tensor, missing: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Go back through the K masked softmaxes; the masks are constants.

    :param missing: as of ``_scored``. Where it is given, ids were recorded, and the expert of a
        round need not be the best of those left.
    """
    left, grad_x, weights = l, torch.zeros_like(l), []
    for k in range(chosen.shape[1]):
        best = chosen[:, k : k + 1]
        top = left.gather(-1, best) if missing is None else left.amax(-1, keepdim=True)
        far = (top - l) / l.abs().maximum(top) > 2 * spec.jitter
        p = left.masked_fill(far, -torch.inf).softmax(-1)
        v = p.gather(-1, best)
        grad_v = grad_u[:, k : k + 1]
        grad_x = grad_x - p * (grad_v * v)
        grad_x = grad_x.scatter_add(-1, best, grad_v * v)
        weights.append(v)
        struck: Tensor | float = -torch.inf
        if missing is not None:
            struck = torch.where(missing[:, k : k + 1], left.gather(-1, best), -torch.inf)
        left = left.scatter(-1, best, struck)
    return grad_x, torch.cat(weights, -1), torch.ones_like(l)
