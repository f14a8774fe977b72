"""The patch point of TensorRT-LLM.

NVIDIA/TensorRT-LLM 0f3e29af, tensorrt_llm/_torch/modules/fused_moe/routing.py.
"""

from __future__ import annotations

from enum import IntEnum

from torch import Tensor, nn


class RoutingMethodType(IntEnum):
    Default = 0
    Unspecified = 6


class BaseMoeRoutingMethod(nn.Module):
    top_k: int

    def apply(self, _router_logits: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override] # theirs is no Module.apply
        raise NotImplementedError

    def get_experts_per_token(self) -> int:
        return self.top_k

    @property
    def experts_per_token(self) -> int:
        return self.get_experts_per_token()

    @property
    def routing_method_type(self) -> RoutingMethodType:
        return RoutingMethodType.Default


def run_moe(method: BaseMoeRoutingMethod, router_logits: Tensor, experts: Tensor) -> Tensor:
    """Return the weighted sum of each token's experts, given all ``[E, H]``.

    The engine's MoE modules use a routing method in this way.
    """
    token_selected_experts, token_final_scales = method.apply(router_logits)
    if token_selected_experts.shape != (router_logits.shape[0], method.experts_per_token):
        msg = f"selected experts: {list(token_selected_experts.shape)}"
        raise ValueError(msg)
    return (experts[token_selected_experts] * token_final_scales.unsqueeze(-1)).sum(1)
