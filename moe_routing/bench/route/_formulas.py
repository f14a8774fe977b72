"""What people write without a routing library.

The comparison ``eager``, and what ``torch.compile`` is given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from moe_routing_registry import RoutingSpec

    Formula = Callable[..., tuple[Tensor, Tensor]]


def formula_of(spec: RoutingSpec) -> Formula | None:
    """Return the spec as model code writes it, or ``None`` where nobody writes it in a few lines.

    Ties go wherever ``torch.topk`` puts them, and NaN is not looked after: that is what it is
    compared for.
    """
    if spec.per_expert_scale:
        return one_hot
    odd = (
        spec.selection in ("token_table", "sparsemixer")
        or spec.topk_per_group
        or spec.shared_experts
        or spec.zero_experts
    )
    if (
        odd
        or spec.logit_softcap is not None
        or spec.logit_multiplier != 1.0
        or spec.score not in _SCORES
    ):
        return None

    def written_out(logits: Tensor, topk: int, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        scores = _SCORES[spec.score](logits.float())
        choice = (
            logits
            if bias is None
            else (scores if spec.selection == "scores_plus_bias" else logits.float()) + bias
        )
        if spec.grouped:
            judged = choice if spec.group_by == "selection" else scores
            best = judged.unflatten(-1, (spec.num_groups, -1))
            best = best.topk(min(spec.group_sum, best.shape[-1]), dim=-1).values.sum(-1)
            kept = torch.zeros_like(best).scatter(
                -1, best.topk(spec.topk_groups, dim=-1).indices, 1.0
            )
            groups = choice.unflatten(-1, (spec.num_groups, -1))
            choice = groups.masked_fill(kept[..., None] == 0, -torch.inf).flatten(-2)
        ids = choice.topk(topk, dim=-1).indices
        weights = scores.gather(-1, ids)
        if spec.renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + spec.renorm_epsilon).clamp(
                min=spec.renorm_floor
            )
        return weights * spec.scale, ids.int()

    return written_out


def one_hot(logits: Tensor, topk: int, per_expert_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Route as the published Gemma4 reference does.

    Mask the softmax over all experts to the chosen by a one-hot.

    >>> weights, ids = one_hot(torch.tensor([[0.0, 2.0, 1.0]]), 2, torch.ones(3))
    >>> ids.tolist(), round(float(weights.sum()), 6)
    ([[1, 2]], 1.0)
    """
    ids = logits.topk(topk, dim=-1).indices
    chosen = torch.nn.functional.one_hot(ids, logits.shape[-1]).sum(-2)
    gates = chosen * logits.softmax(-1)
    total = gates.sum(-1, keepdim=True)
    weights = (gates / total.where(total > 0, 1.0)).gather(1, ids) * per_expert_scale[ids].to(
        gates.dtype
    )
    return weights.float(), ids.int()


def _sqrtsoftplus(x: Tensor) -> Tensor:
    return torch.nn.functional.softplus(x).sqrt()


def _softmax(x: Tensor) -> Tensor:
    return x.softmax(-1)


_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": _softmax,
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": _sqrtsoftplus,
}
