"""SGLang 0.5.23: ``TopK`` layers with plain top-k route through moe_routing.

``select_experts`` calls the hook ``custom_routing_function``, which the adapter sets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang.srt.layers.moe.topk import TopK

import moe_routing

if TYPE_CHECKING:
    from torch import Tensor, nn


def adapt(model: nn.Module, router: str) -> int:
    """Route a loaded model's plain TopK layers by a model name, ``"qwen3_moe"`` for example.

    Return the number of those layers.
    """
    spec = moe_routing.get_router(router).spec
    routes = {
        said: moe_routing.get_router(spec.replace(renormalize=said)) for said in (True, False)
    }

    def custom_routing_function(
        hidden_states: Tensor,  # noqa: ARG001 -- SGLang passes it by name
        gating_output: Tensor,
        topk: int,
        renormalize: bool,  # noqa: FBT001 -- SGLang's signature
    ) -> tuple[Tensor, Tensor]:
        # Float32 and int32, as SGLang's kernels return them.
        return routes[renormalize](gating_output, topk)

    plain = [
        layer.topk_config
        for layer in model.modules()
        if isinstance(layer, TopK)
        if layer.topk_config.custom_routing_function is None
        and layer.topk_config.correction_bias is None
        if not layer.topk_config.use_grouped_topk
        and not layer.topk_config.shared_experts.num_fused_shared_experts
        if not layer.topk_config.fused_gate_packed_ids
        if layer.topk_config.scoring_func == spec.score
    ]
    for config in plain:
        config.custom_routing_function = custom_routing_function
    return len(plain)
