"""Recipes: how each kind of router in transformers is routed, and the form of its outputs.

The router's block expects that form. Which classes a recipe is proven for stands in
``fingerprints.json``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 -- its usual name

from moe_routing.integrations.transformers import _fronts, _gates, _logits
from moe_routing.integrations.transformers._deferred import DeferredSoftmax
from moe_routing.integrations.transformers._specs import Settings, of, prove_ernie_statics
from moe_routing.models import MODELS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from moe_routing import RoutingSpec
    from moe_routing.integrations.transformers._fronts import ReadFront
    from moe_routing.integrations.transformers._loads import Route
    from moe_routing.integrations.transformers._logits import Router
    from moe_routing.models import ModelPreset

Outputs = tuple[Any, ...]


# Further operands, from the router or from what its block passes after the hidden states.


def _nothing(_router: Router) -> dict[str, Tensor]:
    return {}


def _own_bias(router: Router) -> dict[str, Tensor]:
    return {"bias": router.e_score_correction_bias}


def _ernie_bias(router: Router) -> dict[str, Tensor]:
    return {"bias": router.moe_statics.e_score_correction_bias.flatten()}


def _given_bias(_router: Router, e_score_correction_bias: Tensor) -> dict[str, Tensor]:
    return {"bias": e_score_correction_bias}


def _afmoe_bias(_router: Router, expert_bias: Tensor) -> dict[str, Tensor]:
    return {"bias": expert_bias}


def _lfm2_bias(router: Router, expert_bias: Tensor | None = None) -> dict[str, Tensor]:
    return {"bias": expert_bias} if router.use_expert_bias and expert_bias is not None else {}


def _zero_bias(router: Router) -> dict[str, Tensor]:
    """Return zeros as a bias where groups are scored by their probabilities.

    No order of the logits gives the order of those scores.
    """
    weight: Tensor = router.weight
    return {} if router.num_group == 1 else {"bias": weight.new_zeros(router.num_experts)}


def _gemma_scale(router: Router) -> dict[str, Tensor]:
    return {"per_expert_scale": router.per_expert_scale}


def _hash_table(router: Router, input_ids: Tensor) -> dict[str, Tensor]:
    return {"token_ids": input_ids.reshape(-1), "expert_table": router.tid2eid}


def _nothing_to_prove(_router: Router) -> None:
    pass


# K, which may change after loading.


def _topk(router: Router) -> int:
    topk: int = router.top_k
    return topk


def _gemma_topk(router: Router) -> int:
    topk: int = router.config.top_k_experts
    return topk


# Dtype of the weights.


def _float32(_hidden: Tensor, _logits: Tensor) -> torch.dtype:
    return torch.float32


def _of_logits(_hidden: Tensor, logits: Tensor) -> torch.dtype:
    return logits.dtype


def _of_hidden(hidden: Tensor, _logits: Tensor) -> torch.dtype:
    return hidden.dtype


# Outputs.


def _logits_first(_router: Router, logits: Tensor, weights: Tensor, ids: Tensor) -> Outputs:
    return logits, weights, ids


def _ids_first(_router: Router, logits: Tensor, weights: Tensor, ids: Tensor) -> Outputs:
    return ids, weights, logits


def _no_logits(_router: Router, _logits: Tensor, weights: Tensor, ids: Tensor) -> Outputs:
    return weights, ids


def _probabilities_first(router: Router, logits: Tensor, weights: Tensor, ids: Tensor) -> Outputs:
    """Leave the probabilities for later where only the decoder layer sees them.

    The decoder layer throws them away.
    """
    seen = torch.is_grad_enabled() or torch.compiler.is_compiling() or router._forward_hooks  # noqa: SLF001 -- no public way
    return (
        F.softmax(logits, dim=-1, dtype=torch.float32) if seen else DeferredSoftmax(logits),
        weights,
        ids,
    )


def _dense_scores(_router: Router, logits: Tensor, weights: Tensor, ids: Tensor) -> Outputs:
    return torch.zeros_like(logits).scatter(1, ids, weights), logits


def _sorted_by_expert(router: Router, logits: Tensor, weights: Tensor, ids: Tensor) -> Outputs:
    """Sort JetMoe's pairs of token and expert by expert.

    Its block splits by a list of how many each expert got.
    """
    experts, order = ids.flatten().sort()
    sizes = torch.bincount(experts, minlength=router.num_experts).tolist()
    return (
        order,
        order.div(router.top_k, rounding_mode="trunc"),
        weights.flatten()[order],
        sizes,
        logits,
    )


def _zaya(
    router: Router, route: Route, hidden_states: Tensor, router_states: Tensor | None = None
) -> Outputs:
    """Do all that Zaya's router does.

    It passes a state to the next layer's, and its last expert is to skip.
    """
    states: Tensor = router.down_proj(hidden_states)
    if router.use_eda and router_states is not None:
        states = states + router_states * router.router_states_scale
    logits: Tensor = router.router_mlp(states).reshape(-1, router.num_router_classes)
    weights, ids = route(logits, router.top_k, bias=router.balancing_biases, ids_dtype=torch.int64)
    ids = ids.masked_fill(ids == router.num_experts, 0)  # whose weight is 0 already
    return logits, weights.to(logits.dtype), ids, states[:, -hidden_states.shape[1] :].clone()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one kind of router is routed.

    :ivar settings: the preset, and the attributes that its spec depends on, read at each call.
    :ivar logits: computes the logits ``[T, E]`` from the router's input.
    :ivar operands: the further operands of the maths; takes what the block passes after the input.
    :ivar weights: dtype of the weights that the router returns.
    :ivar output: arranges what is returned.
    :ivar method: the method that is replaced.
    :ivar topk: reads K at each call.
    :ivar in_training: whether training routes as inference does; where not, the router's own code
        trains.
    :ivar whole: replaces all of these steps, for a router that does more.
    :ivar prove: raises ``RefusedError`` unless the submodules that the recipe replaces compute what
        is known.
    :ivar front: reads what the logits are made of.
    """

    settings: Settings
    logits: Callable[[Router, Tensor], Tensor] = _logits.linear
    operands: Callable[..., Mapping[str, Any]] = _nothing
    weights: Callable[[Tensor, Tensor], torch.dtype] = _of_logits
    output: Callable[[Router, Tensor, Tensor, Tensor], Outputs] = _logits_first
    method: str = "forward"
    topk: Callable[[Router], int] = _topk
    in_training: bool = True
    whole: Callable[..., Outputs] | None = None
    prove: Callable[[Router], None] = _nothing_to_prove
    front: ReadFront = field(init=False)

    def __post_init__(self) -> None:
        """Find the front of the logits."""
        front = _fronts.FRONTS[self.logits] if self.whole is None else _fronts.of_layers
        object.__setattr__(self, "front", front)

    def spec_of(self, router: Router) -> RoutingSpec:
        """Return the routing spec of a router with its current settings.

        :raises RefusedError: the settings cannot be expressed, or do not fit the number of experts.
        """
        weight = getattr(router, "weight", None)
        num_experts = weight.shape[0] if isinstance(weight, Tensor) else None
        return self.settings.spec_of(router, num_experts, self.topk)

    def forward(
        self,
        router: Router,
        route: Route,
        hidden_states: Tensor,
        *args: Any,  # noqa: ANN401 -- the block's
        **kwargs: Any,  # noqa: ANN401 -- likewise
    ) -> Outputs:
        """Compute what the router's own code returns, routed by ``route``."""
        if self.whole is not None:
            return self.whole(router, route, hidden_states, *args, **kwargs)
        further = {
            "topk": self.topk(router),
            "ids_dtype": torch.int64,
            **self.operands(router, *args, **kwargs),
        }
        made = _gates.gated(self.front, router, route, hidden_states, further)
        if made is None:
            logits = self.logits(router, hidden_states)
            weights, ids = route(logits, **further)
        else:
            weights, ids, logits = made
        return self.output(router, logits, weights.to(self.weights(hidden_states, logits)), ids)


def _also(name: str, **reads: str) -> ModelPreset:
    """Return a preset with further reads.

    What its router can change and its configuration cannot.
    """
    return replace(MODELS[name], reads={**MODELS[name].reads, **reads})


_ZEROS_LOSE = (
    "it gives experts outside the kept groups the score 0, to which scores below 0 lose; "
    "here they never win"
)

RECIPES: Mapping[str, Recipe] = {
    "afmoe": Recipe(settings=of("afmoe"), logits=_logits.afmoe, operands=_afmoe_bias),
    "axk2": Recipe(
        settings=replace(of("axk2"), no_groups=_ZEROS_LOSE),
        logits=_logits.linear_float32,
        operands=_own_bias,
    ),
    "beam": Recipe(
        settings=of("beam", routed_scaling_factor=1.0),
        logits=_logits.linear_float32,
        operands=_own_bias,
    ),
    "cohere2": Recipe(settings=of("cohere2_moe"), weights=_of_hidden),
    "dbrx": Recipe(
        settings=of("dbrx"),
        logits=_logits.as_given,
        output=_no_logits,
        method="route_tokens_to_experts",
    ),
    "deepseek": Recipe(
        settings=of("deepseek_v3"), logits=_logits.linear_float32, operands=_own_bias
    ),
    "deepseek_v2": Recipe(
        settings=of("deepseek_v2", norm_topk_prob=False),
        logits=_logits.linear_float32,
        weights=_float32,
    ),
    "deepseek_v4": Recipe(settings=of("deepseek_v4", norm_topk_prob=True), operands=_own_bias),
    "deepseek_v4_hash": Recipe(
        settings=of("deepseek_v4_hash", norm_topk_prob=True), operands=_hash_table
    ),
    "ernie": Recipe(
        settings=of("ernie4_5_moe"),
        prove=prove_ernie_statics,
        logits=_logits.linear_without_autocast,
        operands=_ernie_bias,
        weights=_of_hidden,
    ),
    "flint": Recipe(settings=of("flint"), logits=_logits.linear_without_autocast),
    "gemma": Recipe(
        settings=of("gemma4", enable_moe_block=True),
        logits=_logits.gemma,
        operands=_gemma_scale,
        weights=_float32,
        output=_probabilities_first,
        topk=_gemma_topk,
    ),
    "gpt_oss": Recipe(settings=of("gpt_oss"), logits=_logits.linear_with_bias),
    "granite": Recipe(
        settings=of("granitemoe"), logits=_logits.linear_then_float32, weights=_of_hidden
    ),
    "granite_ids_first": Recipe(
        settings=of("granitemoe"),
        logits=_logits.linear_then_float32,
        weights=_of_hidden,
        output=_ids_first,
    ),
    "hunyuan": Recipe(settings=of("hunyuan_v1_moe"), logits=_logits.hunyuan),
    "hy_v3": Recipe(settings=of("hy_v3"), logits=_logits.linear_float32, operands=_given_bias),
    "inkling2": Recipe(
        settings=of("inkling2"), logits=_logits.linear_float32_input, operands=_own_bias
    ),
    "jamba": Recipe(settings=of("jamba"), weights=_of_hidden),
    "jetmoe": Recipe(
        settings=of("jetmoe"), logits=_logits.jetmoe, weights=_of_hidden, output=_sorted_by_expert
    ),
    "kolibri": Recipe(settings=of("kolibri1"), logits=_logits.kolibri, operands=_own_bias),
    "laguna": Recipe(
        settings=of("laguna", moe_routed_scaling_factor=1.0, moe_router_logit_softcapping=0.0),
        logits=_logits.laguna,
        operands=_own_bias,
        weights=_of_hidden,
    ),
    "lara_mini": Recipe(
        settings=of("lara_mini"), logits=_logits.linear_float32, weights=_of_hidden
    ),
    "lfm2": Recipe(settings=of("lfm2_moe"), operands=_lfm2_bias),
    "llama4": Recipe(settings=of("llama4"), output=_dense_scores),
    "longcat": Recipe(
        settings=of("longcat_flash", zero_expert_num=0), logits=_logits.longcat, operands=_own_bias
    ),
    "longcat_no_logits": Recipe(
        settings=of("longcat_flash", zero_expert_num=0),
        logits=_logits.longcat,
        operands=_own_bias,
        output=_no_logits,
    ),
    "minimax_m2": Recipe(
        settings=of("minimax_m2"),
        logits=_logits.linear_in_weights_dtype,
        operands=_given_bias,
        weights=_float32,
    ),
    "minimax_m3": Recipe(
        settings=of("minimax_m3_vl", routed_scaling_factor=1.0),
        logits=_logits.linear_in_weights_dtype,
        operands=_own_bias,
        weights=_float32,
    ),
    "mistral": Recipe(settings=of("mistral4"), operands=_zero_bias),
    "mistral_float32": Recipe(
        settings=of("mistral_large4"), logits=_logits.linear_float32, operands=_zero_bias
    ),
    "mixtral": Recipe(settings=of("mixtral"), weights=_float32),
    "muse_spark": Recipe(
        settings=Settings(
            _also("muse_spark", renorm_epsilon="norm_topk_prob_eps"), {"output_multiplier": 1.0}
        ),
        logits=_logits.muse_spark,
        operands=_own_bias,
    ),
    "phimoe": Recipe(settings=of("phimoe"), in_training=False),
    "privacy_filter": Recipe(  # whose block multiplies by K again
        settings=Settings(_also("openai_privacy_filter", scale="1 / top_k")),
        logits=_logits.linear_float32_with_bias,
    ),
    "qwen": Recipe(settings=of("qwen3_moe")),
    "qwen_always": Recipe(settings=of("qwen3_5_moe")),
    "selected": Recipe(settings=of("aria")),
    "selected_ids_first": Recipe(settings=of("aria"), output=_ids_first),
    "zaya": Recipe(settings=of("zaya"), whole=_zaya),
}
