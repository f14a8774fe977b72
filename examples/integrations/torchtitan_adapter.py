"""torchtitan 0.3: token-choice routers that route through moe_routing, in training as well.

The gradients come from moe_routing too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torchtitan.models.common.moe import TokenChoiceTopKRouter

import moe_routing

if TYPE_CHECKING:
    from torch import Tensor, nn


class Router(TokenChoiceTopKRouter):
    """The same parameters and settings; only ``forward`` differs."""

    route: moe_routing.Router

    def forward(
        self, x_BLD: Tensor, expert_bias_E: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return weights in float32, ids in int64, and the scores.

        Weights and ids are ``[B, L, K]``, the scores ``[B, L, E]``.
        """
        with torch.autocast(device_type=x_BLD.device.type, dtype=torch.float32):
            logits: Tensor = self.gate(x_BLD)
        bias = (
            torch.zeros(self.num_experts, device=logits.device)
            if expert_bias_E is None
            else expert_bias_E
        )
        weights, ids = self.route(logits, self.top_k, bias=bias, ids_dtype=torch.int64)
        scores = logits.sigmoid() if self.score_func == "sigmoid" else logits.softmax(dim=-1)
        return weights, ids, scores


def adapt(model: nn.Module) -> int:
    """Turn a model's routers into ours, in place; return how many."""
    stock = (module for module in model.modules() if type(module) is TokenChoiceTopKRouter)
    routers = [router for router in stock if not router._debug_force_load_balance]  # noqa: SLF001 -- a benchmark's switch
    for router in routers:
        router.__class__ = Router
        cast("Router", router).route = moe_routing.get_router(_spec(router))
    return len(routers)


def _spec(router: TokenChoiceTopKRouter) -> moe_routing.RoutingSpec:
    """Return the spec of a router.

    A router selects on the scores, whether its block has a bias or not.
    """
    grouped = router.num_expert_groups is not None
    return moe_routing.RoutingSpec(
        family=f"torchtitan_{router.score_func}",
        score=router.score_func,
        selection="scores_plus_bias",
        renormalize=router.route_norm,
        renorm_epsilon=1e-20 if router.route_norm else 0.0,
        scale=router.route_scale,
        num_groups=router.num_expert_groups or 1,
        topk_groups=router.num_limited_groups or 1,
        group_sum=2 if grouped else 1,
    )
