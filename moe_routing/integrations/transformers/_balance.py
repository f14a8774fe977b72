"""The load balancing loss of transformers' models, without a tensor of scores kept for each layer.

Autograd through transformers' own keeps the softmax of every layer's logits until the way back.
Here only the logits are kept, which the model's output holds anyway, and the way back computes the
softmax again. What is summed is otherwise what transformers sums: the softmax in the dtype of the
logits, and the best K of it, which need not be the experts that the model selected.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_routing.balancing.losses import Sums, imbalance
from moe_routing.balancing.sums import through_softmax
from moe_routing.private_api import softmax_backward


def load_balancing_loss(
    gate_logits: tuple[Tensor, ...] | Tensor | None,
    num_experts: int,
    top_k: int = 2,
    attention_mask: Tensor | None = None,
) -> Tensor | int:
    """Return what ``load_balancing_loss_func`` of transformers' models returns.

    The parameters are that function's: its callers pass some by position.
    """
    if not isinstance(gate_logits, tuple):
        return 0  # what their function returns, for models that recorded nothing
    device = gate_logits[0].device
    weights = None
    if attention_mask is not None:
        weights = attention_mask.reshape(-1).to(device, torch.float32)
    layers = [_sums(logits.to(device), weights, num_experts, top_k) for logits in gate_logits]
    scores, counts = (torch.stack([layer[of] for layer in layers]).sum(0) for of in (0, 1))
    rows = sum(logits.shape[0] for logits in gate_logits)
    tokens = rows if weights is None else weights.sum() * len(layers)
    return top_k * imbalance(Sums(scores, counts, tokens))


def _sums(
    logits: Tensor, weights: Tensor | None, num_experts: int, top_k: int
) -> tuple[Tensor, Tensor]:
    """Sum the scores of one layer over its tokens, and count the experts with the best of them.

    :param weights: ``[T]``, float32, how much each token counts; ``None`` for 1.
    :returns: float32 ``[E]`` twice.
    """
    if torch.compiler.is_compiling():  # the compiler decides what to keep
        return _LayerSums.forward(logits, weights, num_experts, top_k)
    made: tuple[Tensor, Tensor] = _LayerSums.apply(logits, weights, num_experts, top_k)  # type: ignore[no-untyped-call]
    return made


def _weighted(x: Tensor, weights: Tensor | None) -> Tensor:
    return x if weights is None else x * weights.unsqueeze(-1)


class _LayerSums(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        logits: Tensor, weights: Tensor | None, num_experts: int, top_k: int
    ) -> tuple[Tensor, Tensor]:
        scores = logits.softmax(-1)
        ids = scores.topk(top_k, -1).indices
        slots = _weighted(scores.new_ones(ids.shape, dtype=torch.float32), weights)
        counts = slots.new_zeros(num_experts).scatter_add(0, ids.flatten(), slots.flatten())
        return _weighted(scores.float(), weights).sum(0), counts

    @staticmethod
    def setup_context(
        ctx: Any,  # noqa: ANN401 -- a bag by design
        inputs: tuple[Tensor, Tensor | None, int, int],
        output: tuple[Tensor, Tensor],
    ) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs[:2])
        ctx.save_for_forward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401 -- a bag by design
        logits, weights = ctx.saved_tensors
        of_scores = _weighted(upstream[0].expand(logits.shape), weights).to(logits.dtype)
        return softmax_backward(of_scores, logits.softmax(-1)), None, None, None

    @staticmethod
    def jvp(ctx: Any, of_logits: Tensor, *_constant: None) -> tuple[Tensor, None]:  # noqa: ANN401 -- a bag by design
        logits, weights = ctx.saved_tensors
        of_scores = through_softmax(of_logits.float(), logits.softmax(-1).float())
        return _weighted(of_scores, weights).sum(0), None
