"""TensorRT-LLM's PyTorch backend: a routing method that routes through moe_routing.

Give it to ``create_moe``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from tensorrt_llm._torch.modules.fused_moe.routing import BaseMoeRoutingMethod, RoutingMethodType

import moe_routing

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class MoeRoutingMethod(BaseMoeRoutingMethod):
    """Route by a model name.

    ``bias`` fetches the selection bias at each call, as TensorRT-LLM's own methods do.
    """

    def __init__(self, router: str, top_k: int, bias: Callable[[], Tensor] | None = None) -> None:
        """Look the router up."""
        super().__init__()
        self.route, self.top_k, self.bias = moe_routing.get_router(router), top_k, bias

    def apply(self, router_logits: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]  # theirs is no Module.apply
        """Return ids in int32 and weights in float32, in TensorRT-LLM's order."""
        bias = None if self.bias is None else self.bias()
        weights, ids = self.route(router_logits, self.top_k, bias=bias, ids_dtype=torch.int32)
        return ids, weights

    @property
    def routing_method_type(self) -> RoutingMethodType:
        """Name none of the methods that fused kernels know."""
        return RoutingMethodType.Unspecified
