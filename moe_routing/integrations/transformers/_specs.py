"""The maths of each kind of router, by the very attributes that its own ``forward`` reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F  # noqa: N812 -- its usual name

from moe_routing.families import FAMILIES
from moe_routing.integrations.transformers._fingerprint import RefusedError, fingerprint

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from moe_routing.integrations.transformers._logits import Router
    from moe_routing_registry import RoutingSpec

ERNIE_STATICS = {"4dcdbd880a75"}
"""Fingerprints of the submodule that adds Ernie's bias to its scores."""


def fixed(family: str, **changes: Any) -> Callable[[Router], RoutingSpec]:  # noqa: ANN401 -- fields of RoutingSpec
    spec = FAMILIES[family].spec.replace(**changes)
    return lambda _router: spec


def renormalized(family: str, **changes: Any) -> Callable[[Router], RoutingSpec]:  # noqa: ANN401 -- likewise
    return lambda router: FAMILIES[family].spec.replace(renormalize=router.norm_topk_prob, **changes)


def score_name(function: Callable[[Tensor], Tensor]) -> str:
    """Find out what a score function computes."""
    x = torch.tensor([-3.0, 0.5, 4.0], device="cpu")
    for name, score in (("sigmoid", x.sigmoid()), ("sqrtsoftplus", F.softplus(x).sqrt())):
        if torch.allclose(function(x), score):
            return name
    msg = f"its score function {function} is neither sigmoid nor sqrt(softplus)"
    raise RefusedError(msg)


def cohere2(router: Router) -> RoutingSpec:
    if router.expert_selection_fn == "softmax":
        return FAMILIES["topk_softmax"].spec
    return FAMILIES["sigmoid_topk"].spec.replace(renormalize=router.norm_topk_prob)


def dbrx(router: Router) -> RoutingSpec:
    if router.moe_normalize_expert_weights not in {1, None}:
        msg = f"its weights are divided by their p-norm with p = {router.moe_normalize_expert_weights}; known are 1 and None"
        raise RefusedError(msg)
    return FAMILIES["softmax_topk"].spec.replace(renormalize=router.moe_normalize_expert_weights is not None)


def grouped_sigmoid(router: Router, scale: float) -> RoutingSpec:
    said = {"renormalize": router.norm_topk_prob, "renorm_epsilon": 1e-20, "scale": scale}
    if router.num_group in {1, None}:
        return FAMILIES["sigmoid_bias_topk"].spec.replace(**said)
    groups = {"num_groups": router.num_group, "topk_groups": router.topk_group}
    return FAMILIES["grouped_sigmoid_bias"].spec.replace(**groups, **said)


def deepseek(router: Router) -> RoutingSpec:
    return grouped_sigmoid(router, router.routed_scaling_factor)


def axk2(router: Router) -> RoutingSpec:
    if router.num_group not in {1, None}:
        msg = "it gives experts outside the kept groups the score 0, to which scores below 0 lose; here they never win"
        raise RefusedError(msg)
    return deepseek(router)


def deepseek_v2(router: Router) -> RoutingSpec:
    if router.topk_method == "greedy":
        return FAMILIES["softmax_topk"].spec.replace(scale=router.routed_scaling_factor)
    groups = {"num_groups": router.num_group, "topk_groups": router.topk_group}
    return FAMILIES["grouped_softmax"].spec.replace(**groups, scale=router.routed_scaling_factor)


def mistral(router: Router) -> RoutingSpec:
    said = {"scale": router.routed_scaling_factor, "renormalize": getattr(router, "norm_topk_prob", True)}
    if router.num_group == 1:
        return FAMILIES["softmax_topk"].spec.replace(**said)
    groups = {"num_groups": router.num_group, "topk_groups": router.topk_group, "group_score": "top2_sum"}
    return FAMILIES["grouped_softmax"].spec.replace(**groups, **said, selection="scores_plus_bias")


def deepseek_v4(router: Router) -> RoutingSpec:
    family = {"sigmoid": "sigmoid_bias_topk", "sqrtsoftplus": "sqrtsoftplus_bias"}[score_name(router.score_fn)]
    return FAMILIES[family].spec.replace(scale=router.routed_scaling_factor, renorm_epsilon=1e-20)


def deepseek_v4_hash(router: Router) -> RoutingSpec:
    said = {"scale": router.routed_scaling_factor, "renorm_epsilon": 1e-20}
    return FAMILIES["hash_sqrtsoftplus"].spec.replace(score=score_name(router.score_fn), **said)


def lfm2(router: Router) -> RoutingSpec:
    family = "sigmoid_bias_topk" if router.use_expert_bias else "sigmoid_topk"
    said = {"renormalize": router.norm_topk_prob, "renorm_epsilon": 1e-6, "scale": router.routed_scaling_factor}
    return FAMILIES[family].spec.replace(**said)


def ernie(router: Router) -> RoutingSpec:
    if fingerprint(type(router.moe_statics)) not in ERNIE_STATICS:  # the one submodule that is not called, but replaced
        msg = f"the code of {type(router.moe_statics).__qualname__}, which adds its bias, is none that is known"
        raise RefusedError(msg)
    return FAMILIES["softmax_bias_topk"].spec.replace(renormalize=True, renorm_floor=router.norm_min)


def phimoe(router: Router) -> RoutingSpec:
    return FAMILIES["sparsemixer"].spec.replace(jitter=router.router_jitter_noise)


def beam(router: Router) -> RoutingSpec:
    return grouped_sigmoid(router, 1.0)


def privacy_filter(router: Router) -> RoutingSpec:
    return FAMILIES["topk_softmax"].spec.replace(scale=1.0 / router.top_k)


def zaya(_router: Router) -> RoutingSpec:
    return FAMILIES["softmax_bias_topk"].spec.replace(zero_experts=1)


def muse_spark(router: Router) -> RoutingSpec:
    said = {"renorm_epsilon": router.norm_topk_prob_eps, "scale": router.routed_scaling_factor}
    return FAMILIES["sigmoid_bias_topk"].spec.replace(**said)


def scaled_by(attribute: str, family: str, **changes: Any) -> Callable[[Router], RoutingSpec]:  # noqa: ANN401 -- likewise
    return lambda router: FAMILIES[family].spec.replace(scale=getattr(router, attribute), **changes)
