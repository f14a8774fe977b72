"""The patch point of SGLang 0.5.23, sglang/srt/layers/moe/topk.py.

The file has its names and types, and one caller.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class SharedExpertsConfig:
    num_fused_shared_experts: int = 0


@dataclass
class TopKConfig:
    top_k: int
    use_grouped_topk: bool = False
    renormalize: bool = True
    shared_experts: SharedExpertsConfig = field(default_factory=SharedExpertsConfig)
    custom_routing_function: Callable[..., tuple[Tensor, Tensor]] | None = None
    correction_bias: Tensor | None = None
    scoring_func: str = "softmax"
    fused_gate_packed_ids: bool = False


class StandardTopKOutput(NamedTuple):
    topk_weights: Tensor
    topk_ids: Tensor
    router_logits: Tensor


class TopK(nn.Module):
    topk_config: TopKConfig

    def __init__(self, config: TopKConfig) -> None:
        super().__init__()
        self.topk_config = config

    def forward(self, hidden_states: Tensor, router_logits: Tensor) -> StandardTopKOutput:
        """Route as select_experts does.

        It computes by its own maths, or calls the custom function by keywords.
        """
        config = self.topk_config
        if config.custom_routing_function is None:
            scores = torch.softmax(router_logits.float(), dim=-1)
            weights, ids = scores.topk(config.top_k, dim=-1)
            weights = weights / weights.sum(-1, keepdim=True) if config.renormalize else weights
            return StandardTopKOutput(weights, ids.to(torch.int32), router_logits)
        weights, ids = config.custom_routing_function(
            hidden_states=hidden_states,
            gating_output=router_logits,
            topk=config.top_k,
            renormalize=config.renormalize,
        )
        return StandardTopKOutput(weights, ids, router_logits)
