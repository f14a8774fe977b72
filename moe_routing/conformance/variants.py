"""The specs that the kit routes.

Every family, and the modifiers that models put on the built-in ones. Free of torch.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

from moe_routing._registry import registry
from moe_routing.families import FAMILIES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moe_routing_registry import RoutingSpec


def _built_in() -> dict[str, RoutingSpec]:
    family = {name: family_spec.spec for name, family_spec in FAMILIES.items()}
    modified = {
        "softmax_topk/renormalized_scaled": family["softmax_topk"].replace(
            renormalize=True, scale=2.5
        ),
        "softmax_topk/softcap": family["softmax_topk"].replace(logit_softcap=30.0),
        "softmax_topk/multiplier": family["softmax_topk"].replace(
            logit_multiplier=0.39, renormalize=True
        ),
        "gemma4/shared": family["gemma4"].replace(shared_experts=2, shared_weight=0.4),
        "softmax_bias_topk/floor": family["softmax_bias_topk"].replace(
            renormalize=True, renorm_floor=1e-12
        ),
        "softmax_bias_topk/ratio": family["softmax_bias_topk"].replace(renormalize=True),
        "softmax_bias_topk/zero_experts": family["softmax_bias_topk"].replace(
            zero_experts=8, scale=6.0
        ),
        "sigmoid_topk/renormalized": family["sigmoid_topk"].replace(renormalize=True),
        "sigmoid_bias_topk/scaled_shared": family["sigmoid_bias_topk"].replace(
            scale=2.827, shared_experts=1
        ),
        "sigmoid_bias_topk/softcap": family["sigmoid_bias_topk"].replace(
            logit_softcap=15.0, logit_multiplier=1.7
        ),
        "grouped_sigmoid_bias/scaled": family["grouped_sigmoid_bias"].replace(scale=2.5),
        "grouped_sigmoid_bias/max": family["grouped_sigmoid_bias"].replace(
            group_sum=1, num_groups=4, topk_groups=3
        ),
        "grouped_sigmoid_bias/best_three": family["grouped_sigmoid_bias"].replace(
            group_sum=3, num_groups=4, topk_groups=1
        ),
        "grouped_sigmoid_bias/unbiased_groups": family["grouped_sigmoid_bias"].replace(
            group_by="scores"
        ),
        "grouped_softmax/best_four_scores": family["grouped_softmax"].replace(
            group_sum=4, group_by="scores", num_groups=4, topk_groups=2
        ),
        "grouped_softmax/renormalized_scaled": family["grouped_softmax"].replace(
            renormalize=True, scale=16.0
        ),
        "grouped_softmax/top2": family["grouped_softmax"].replace(
            group_sum=2, num_groups=4, topk_groups=2
        ),
        "sqrtsoftplus_bias/scaled": family["sqrtsoftplus_bias"].replace(scale=1.5),
        "logit_bias_sigmoid/renormalized": family["logit_bias_sigmoid"].replace(renormalize=True),
        "logit_bias_sigmoid/softmax": family["logit_bias_sigmoid"].replace(score="softmax"),
    }
    return family | modified


BUILT_IN: Mapping[str, RoutingSpec] = MappingProxyType(_built_in())
"""Name -> spec. What stands before the slash is the family."""

VARIANTS: Mapping[str, RoutingSpec] = MappingProxyType(
    {**{name: family_spec.spec for name, family_spec in registry().families.items()}, **BUILT_IN}
)
"""The same, with the families of plug-ins, each held to the oracle that it brings."""


def fits(spec: RoutingSpec, num_experts: int, topk: int) -> bool:
    """Whether a problem with this E and K exists.

    Sparsemixer's K rounds must also end in reasonable time.
    """
    if topk > num_experts or spec.zero_experts > num_experts or num_experts % spec.num_groups:
        return False
    group = num_experts // spec.num_groups
    if spec.topk_per_group:
        return topk % spec.num_groups == 0 and topk // spec.num_groups <= group
    if spec.selection == "sparsemixer":
        return topk <= 4  # noqa: PLR2004 -- models use 2; each round is a pass over the row
    return topk <= spec.topk_groups * group or not spec.grouped
