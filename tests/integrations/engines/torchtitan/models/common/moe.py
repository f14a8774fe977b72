"""The patch point of torchtitan 0.3.0, torchtitan/models/common/moe.py: settings and signature."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn


class TokenChoiceTopKRouter(nn.Module):
    def __init__(
        self,
        dim: int,
        num_experts: int,
        num_expert_groups: int | None,
        num_limited_groups: int | None,
        top_k: int,
        score_func: Literal["softmax", "sigmoid"],
        route_norm: bool,
        route_scale: float,
        gate_bias: bool,
        _debug_force_load_balance: bool = False,
    ) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, num_experts, bias=gate_bias)
        self.num_experts, self.top_k = num_experts, top_k
        self.num_expert_groups, self.num_limited_groups = num_expert_groups, num_limited_groups
        self.score_func: Literal["softmax", "sigmoid"] = score_func
        self.route_norm, self.route_scale = route_norm, route_scale
        self._debug_force_load_balance = _debug_force_load_balance

    def forward(
        self, x_BLD: Tensor, expert_bias_E: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute what torchtitan's docstring says.

        Return scores and ids ``[B, L, K]``, and all scores ``[B, L, E]``.
        """
        logits = self.gate(x_BLD).float()
        scores = logits.sigmoid() if self.score_func == "sigmoid" else logits.softmax(-1)
        choice = scores if expert_bias_E is None else scores + expert_bias_E
        if self.num_expert_groups is not None:
            grouped = choice.unflatten(-1, (self.num_expert_groups, -1))
            kept = (
                grouped.topk(2, dim=-1)
                .values.sum(-1)
                .topk(self.num_limited_groups or 1, dim=-1)
                .indices
            )
            outside = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(
                -1, kept, value=False
            )
            choice = grouped.masked_fill(outside.unsqueeze(-1), -torch.inf).flatten(-2)
        ids = choice.topk(self.top_k, dim=-1, sorted=False).indices
        weights = scores.gather(-1, ids)
        if self.route_norm:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.route_scale, ids, scores


class MoE(nn.Module):
    """The router's caller.

    It passes the bias by position, sums the experts by weight, and counts tokens by a map of ids.
    """

    def __init__(
        self, router: TokenChoiceTopKRouter, experts: Tensor, expert_bias: Tensor | None
    ) -> None:
        super().__init__()
        self.router, self.experts, self.expert_bias = router, nn.Parameter(experts), expert_bias

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids, scores = self.router(x, self.expert_bias)
        routed = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, ids, value=True)
        return (self.experts[ids] * weights.unsqueeze(-1)).sum(-2), routed.sum((0, 1))
