"""Clause 15: gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moe_routing.formula import weights_backward
from mutants._mutant import Reference, caught_by

if TYPE_CHECKING:
    from torch import Tensor


@caught_by(
    "gradients_match_autograd_through_the_oracle", "topk_softmax", saying="gradient of logits at"
)
class GradientWithoutTheSum(Reference):
    """Brings a backward that forgets how the denominator depends on the logits."""

    def backward(
        self, grad_weights: Tensor, logits: Tensor, ids: Tensor, scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return ``grad * w`` at the chosen ids, and no gradient of the scale."""
        weights = self.weigh(logits.detach(), ids.long(), None, scale).float()
        grad = torch.zeros_like(logits).scatter_add(
            1, ids.long(), (grad_weights * weights).to(logits.dtype)
        )
        return grad, logits.new_empty(0) if scale is None else torch.zeros_like(scale)


@caught_by(
    "gradients_of_nan_and_inf_are_zero",
    "topk_softmax",
    saying="gradient of logits at .*: nan, exactly 0",
)
class NanHasANanGradient(Reference):
    """Brings a backward that multiplies by the logits' own derivative, which NaN has none of."""

    def backward(
        self, grad_weights: Tensor, logits: Tensor, ids: Tensor, scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the closed form's gradients, and NaN for logits that are NaN."""
        by_logits, by_scale = weights_backward(self.spec, grad_weights, logits, ids, scale)
        return by_logits.where(~logits.isnan(), torch.nan), by_scale


@caught_by(
    "a_router_warmed_up_for_training_has_right_gradients",
    "topk_softmax",
    saying="gradient of logits at .*: 0, exactly",
)
class WarmupLeavesItsGradient(Reference):
    """Keeps the gradients of the zeros that warmed it up, and returns them once more."""

    left = False

    def backward(
        self, grad_weights: Tensor, logits: Tensor, ids: Tensor, scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the closed form's gradients, unless something is left."""
        left, self.left = self.left, len(logits) == 1 and not logits.any()
        by_logits, by_scale = weights_backward(self.spec, grad_weights, logits, ids, scale)
        return (
            (torch.zeros_like(by_logits), torch.zeros_like(by_scale))
            if left
            else (by_logits, by_scale)
        )


@caught_by(
    "scales_that_are_not_finite_spoil_no_other_gradient",
    "gemma4",
    saying=r"gradient of logits in row \d+, which no scale",
)
class PaddingHasAScale(Reference):
    """Brings a backward that takes the scale of expert 0 for padding, times a gradient of 0."""

    def backward(
        self, grad_weights: Tensor, logits: Tensor, ids: Tensor, scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the closed form's gradients, with what 0 times the scale adds to each row."""
        by_logits, by_scale = weights_backward(self.spec, grad_weights, logits, ids, scale)
        if scale is not None:
            by_logits = by_logits + (0 * scale[ids.long().clamp(min=0)]).sum(-1, keepdim=True).to(
                logits.dtype
            )
        return by_logits, by_scale
