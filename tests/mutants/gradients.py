"""Clause 15: gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mutants._mutant import Reference, caught_by

if TYPE_CHECKING:
    from torch import Tensor


@caught_by("gradients_match_autograd_through_the_oracle", "topk_softmax", saying="gradient of logits at")
class GradientWithoutTheSum(Reference):
    """Brings a backward that forgets how the denominator depends on the logits."""

    def backward(self, grad_weights: Tensor, logits: Tensor, ids: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return ``grad * w`` at the chosen ids, and no gradient of the scale."""
        weights = self.weigh(logits.detach(), ids.long(), None, scale).float()
        grad = torch.zeros_like(logits).scatter_add(1, ids.long(), (grad_weights * weights).to(logits.dtype))
        return grad, logits.new_empty(0) if scale is None else torch.zeros_like(scale)
