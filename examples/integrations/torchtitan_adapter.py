"""torchtitan: a token-choice router, for training, whose routing and gradients are moe_routing's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torchtitan.models.common.moe.moe import TokenChoiceTopKRouter

import moe_routing

if TYPE_CHECKING:
    from torch import Tensor, nn


class Router(TokenChoiceTopKRouter):
    """The same parameters and settings; only ``forward`` is ours."""

    def forward(self, x: Tensor, expert_bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return weights ``[T, K]`` in float32, ids in int64, and the number of tokens of each expert."""
        logits: Tensor = self.gate(x)
        biased = self.num_expert_groups is not None or expert_bias is not None
        spec = moe_routing.RoutingSpec(
            family=f"torchtitan_{self.score_func}",
            score=self.score_func,
            selection="scores_plus_bias" if biased else "logits",
            renormalize=self.route_norm,
            renorm_epsilon=1e-20 if self.route_norm else 0.0,
            scale=self.route_scale,
            num_groups=self.num_expert_groups or 1,
            topk_groups=self.num_limited_groups or 1,
            group_score="top2_sum" if self.num_expert_groups else "max",
        )
        bias = torch.zeros(self.num_experts, device=x.device) if biased and expert_bias is None else expert_bias
        weights, ids = moe_routing.get_router(spec)(logits, self.top_k, bias=bias, ids_dtype=torch.int64)
        counts = torch.zeros(self.num_experts, dtype=torch.int64, device=x.device)
        return weights, ids, counts.scatter_add(0, ids.flatten(), torch.ones_like(ids).flatten())


def adapt(model: nn.Module) -> int:
    """Turn a model's routers into ours, in place; return how many."""
    stock = (module for module in model.modules() if type(module) is TokenChoiceTopKRouter)
    routers = [router for router in stock if not router._debug_force_load_balance]  # noqa: SLF001 -- a benchmark's switch
    for router in routers:
        router.__class__ = Router
    return len(routers)
