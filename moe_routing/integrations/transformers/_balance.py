"""The load balancing loss of transformers' models, without a tensor of scores kept for each layer.

Autograd through transformers' own keeps the softmax of every layer's logits until the backward.
Here only the logits are kept, which the model's output holds anyway, and the backward computes the
softmax again. What is summed is otherwise what transformers sums: the softmax in the dtype of the
logits, and the best K of it, which need not be the experts that the model selected.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_routing.balancing.losses import Sums, imbalance
from moe_routing.balancing.sums import sums
from moe_routing_registry.text import refusal


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
    scores, counts = _sums(tuple(x.to(device) for x in gate_logits), weights, num_experts, top_k)
    rows = sum(logits.shape[0] for logits in gate_logits)
    tokens = rows if weights is None else weights.sum() * len(gate_logits)
    return imbalance(Sums(scores, counts, tokens), times=top_k)


def _sums(
    layers: tuple[Tensor, ...], weights: Tensor | None, num_experts: int, top_k: int
) -> tuple[Tensor, Tensor]:
    """Sum the scores of layers over their tokens, and count the experts with the best of them.

    :param weights: ``[T]``, float32, how much each token counts; ``None`` for 1.
    :returns: float32 ``[E]`` twice.
    """
    for logits in layers:
        if logits.shape[-1] != num_experts:
            expected = f"{logits.shape[-1]}, as of logits"
            raise ValueError(refusal("num_experts", expected, num_experts))
    given = None if weights is None else weights.unsqueeze(0)
    scores, counts = sums(layers, None, given, "softmax", top_k)
    return scores.squeeze(0), counts.squeeze(0)
