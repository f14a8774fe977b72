"""The routing spec of each kind of router, from the settings that its own ``forward`` reads.

A recipe names the attributes of the router that it reads; the functions here get their values in
that order. The attributes are read at each call, so a setting that changes after ``patch`` is
followed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 -- its usual name

from moe_routing.families import FAMILIES
from moe_routing.integrations.transformers._fingerprint import RefusedError, fingerprint
from moe_routing_registry.text import shown

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from moe_routing.integrations.transformers._logits import Router
    from moe_routing_registry import RoutingSpec

    Score = Callable[[Tensor], Tensor]

ERNIE_STATICS = {"4dcdbd880a75"}
"""Fingerprints of the submodule that adds Ernie's bias to its scores."""


@dataclass(frozen=True)
class Settings:
    """The attributes of a router that its routing depends on, and the spec that their values give.

    :ivar names: the attributes.
    :ivar spec: takes their values; raises ``RefusedError`` or ``ValueError`` for values that cannot
        be expressed.
    """

    names: tuple[str, ...]
    spec: Callable[..., RoutingSpec]

    def read(self, router: Router) -> tuple[Any, ...]:
        """Return the values; of a submodule, such as a score function, its class."""
        return tuple([_constant(getattr(router, name, None)) for name in self.names])

    def spec_of(
        self, router: Router, num_experts: int | None, topk: Callable[[Router], int]
    ) -> RoutingSpec:
        """Return the spec for the router's current settings.

        :param num_experts: E, ``None`` if it is not known.
        :param topk: reads K.
        :raises RefusedError: they are missing, cannot be expressed, or do not fit E and K; names
            them.
        """
        try:
            spec = self.spec(*[getattr(router, name) for name in self.names])
            if num_experts is not None:
                spec.check_size(num_experts, topk(router))
        except (AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
            said = ", ".join(
                f"{name}={shown(getattr(router, name, 'missing'))}" for name in self.names
            )
            msg = f"its settings cannot be routed: {error}" + (
                f"; read from {said}" if said else ""
            )
            raise RefusedError(msg) from error
        return spec


def _constant(value: object) -> object:
    """Return what ``torch.compile`` can compare: a class's name in place of a submodule."""
    return type(value).__qualname__ if isinstance(value, nn.Module) else value


def fixed(family: str, **changes: Any) -> Settings:  # noqa: ANN401 -- fields of RoutingSpec
    spec = FAMILIES[family].spec.replace(**changes)
    return Settings((), lambda: spec)


def renormalized(family: str) -> Settings:
    return Settings(
        ("norm_topk_prob",), lambda norm: FAMILIES[family].spec.replace(renormalize=bool(norm))
    )


def scaled_by(attribute: str, family: str, **changes: Any) -> Settings:  # noqa: ANN401 -- fields of RoutingSpec
    return Settings(
        (attribute,), lambda scale: FAMILIES[family].spec.replace(scale=scale, **changes)
    )


def score_name(function: Score) -> str:
    """Find out what a score function computes."""
    x = torch.tensor([-3.0, 0.5, 4.0], device="cpu")
    for name, score in (("sigmoid", x.sigmoid()), ("sqrtsoftplus", F.softplus(x).sqrt())):
        if torch.allclose(function(x), score):
            return name
    msg = f"its score function {shown(function)} is neither sigmoid nor sqrt(softplus)"
    raise RefusedError(msg)


def _cohere2(selection: str, norm: object) -> RoutingSpec:
    if selection == "softmax":
        return FAMILIES["topk_softmax"].spec
    if selection == "sigmoid":
        return FAMILIES["sigmoid_topk"].spec.replace(renormalize=bool(norm))
    msg = f"expert_selection_fn: expected 'softmax' or 'sigmoid', got {shown(selection)}"
    raise RefusedError(msg)


def _dbrx(p: float | None) -> RoutingSpec:
    if p not in {1, None}:
        msg = f"its weights are divided by their p-norm with p = {shown(p)}; known are 1 and None"
        raise RefusedError(msg)
    return FAMILIES["softmax_topk"].spec.replace(renormalize=p is not None)


def _deepseek(
    num_group: int | None, topk_group: int | None, norm: object, scale: float
) -> RoutingSpec:
    changes = {"renormalize": bool(norm), "renorm_epsilon": 1e-20, "scale": scale}
    if num_group in {1, None}:
        return FAMILIES["sigmoid_bias_topk"].spec.replace(**changes)
    return FAMILIES["grouped_sigmoid_bias"].spec.replace(
        num_groups=num_group, topk_groups=topk_group, **changes
    )


def _axk2(num_group: int | None, topk_group: int | None, norm: object, scale: float) -> RoutingSpec:
    if num_group not in {1, None}:
        msg = "it gives experts outside the kept groups the score 0, to which scores below 0 lose; here they never win"
        raise RefusedError(msg)
    return _deepseek(num_group, topk_group, norm, scale)


def _deepseek_v2(method: str, num_group: int, topk_group: int, scale: float) -> RoutingSpec:
    if method == "greedy":
        return FAMILIES["softmax_topk"].spec.replace(scale=scale)
    if method == "group_limited_greedy":
        return FAMILIES["grouped_softmax"].spec.replace(
            num_groups=num_group, topk_groups=topk_group, scale=scale
        )
    msg = f"topk_method: expected 'greedy' or 'group_limited_greedy', got {shown(method)}"
    raise RefusedError(msg)


def _mistral(num_group: int, topk_group: int, scale: float, norm: object = True) -> RoutingSpec:  # noqa: FBT002 -- what the class without the setting does
    changes = {"scale": scale, "renormalize": bool(norm)}
    if num_group == 1:
        return FAMILIES["softmax_topk"].spec.replace(**changes)
    groups = {"num_groups": num_group, "topk_groups": topk_group, "group_score": "top2_sum"}
    return FAMILIES["grouped_softmax"].spec.replace(
        **groups, **changes, selection="scores_plus_bias"
    )


def _deepseek_v4(score: Score, scale: float) -> RoutingSpec:
    family = {"sigmoid": "sigmoid_bias_topk", "sqrtsoftplus": "sqrtsoftplus_bias"}[
        score_name(score)
    ]
    return FAMILIES[family].spec.replace(scale=scale, renorm_epsilon=1e-20)


def _deepseek_v4_hash(score: Score, scale: float) -> RoutingSpec:
    return FAMILIES["hash_sqrtsoftplus"].spec.replace(
        score=score_name(score), scale=scale, renorm_epsilon=1e-20
    )


def _lfm2(biased: object, norm: object, scale: float) -> RoutingSpec:
    family = "sigmoid_bias_topk" if biased else "sigmoid_topk"
    return FAMILIES[family].spec.replace(renormalize=bool(norm), renorm_epsilon=1e-6, scale=scale)


def _ernie(floor: float) -> RoutingSpec:
    return FAMILIES["softmax_bias_topk"].spec.replace(renormalize=True, renorm_floor=floor)


def prove_ernie_statics(router: Router) -> None:
    """Raise ``RefusedError`` unless the submodule that Ernie's recipe replaces computes what is known."""
    if fingerprint(type(router.moe_statics)) not in ERNIE_STATICS:
        msg = f"the code of {type(router.moe_statics).__qualname__}, which adds its bias, is none that is known"
        raise RefusedError(msg)


def _phimoe(jitter: float) -> RoutingSpec:
    return FAMILIES["sparsemixer"].spec.replace(jitter=jitter)


def _beam(num_group: int | None, topk_group: int | None, norm: object) -> RoutingSpec:
    return _deepseek(num_group, topk_group, norm, 1.0)


def _muse_spark(epsilon: float, scale: float) -> RoutingSpec:
    return FAMILIES["sigmoid_bias_topk"].spec.replace(renorm_epsilon=epsilon, scale=scale)


def _privacy_filter(topk: int) -> RoutingSpec:
    return FAMILIES["topk_softmax"].spec.replace(scale=1.0 / topk)


_GROUPS = ("num_group", "topk_group")
_SCORED = ("score_fn", "routed_scaling_factor")

axk2 = Settings((*_GROUPS, "norm_topk_prob", "routed_scaling_factor"), _axk2)
beam = Settings((*_GROUPS, "norm_topk_prob"), _beam)
cohere2 = Settings(("expert_selection_fn", "norm_topk_prob"), _cohere2)
dbrx = Settings(("moe_normalize_expert_weights",), _dbrx)
deepseek = Settings((*_GROUPS, "norm_topk_prob", "routed_scaling_factor"), _deepseek)
deepseek_v2 = Settings(("topk_method", *_GROUPS, "routed_scaling_factor"), _deepseek_v2)
deepseek_v4 = Settings(_SCORED, _deepseek_v4)
deepseek_v4_hash = Settings(_SCORED, _deepseek_v4_hash)
ernie = Settings(("norm_min",), _ernie)
lfm2 = Settings(("use_expert_bias", "norm_topk_prob", "routed_scaling_factor"), _lfm2)
mistral = Settings((*_GROUPS, "routed_scaling_factor", "norm_topk_prob"), _mistral)
mistral_always = Settings((*_GROUPS, "routed_scaling_factor"), _mistral)
muse_spark = Settings(("norm_topk_prob_eps", "routed_scaling_factor"), _muse_spark)
phimoe = Settings(("router_jitter_noise",), _phimoe)
privacy_filter = Settings(("top_k",), _privacy_filter)
zaya = fixed("softmax_bias_topk", zero_experts=1)
