"""Settings of configurations that contradict a preset: each is refused by name, never ignored.

A preset reads the attributes that its model's router reads. A configuration may say more:
``scoring_func: softmax`` in a configuration of ``deepseek_v3``, whose router takes the sigmoid
whatever is written there. The attributes here mean the same in every model that has them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from moe_routing_registry import RoutingSpec


@dataclass(frozen=True)
class Setting:
    """What some attributes of configurations say about routing.

    :ivar names: the attributes, each under the names that models give it.
    :ivar holds: whether a spec does what a value says.
    :ivar expected: what the attribute would have to say for a spec.
    """

    names: tuple[str, ...]
    holds: Callable[[RoutingSpec, Any], bool]
    expected: Callable[[RoutingSpec], object]


def _is_score(spec: RoutingSpec, value: object) -> bool:
    return isinstance(value, str) and value.lower() == spec.score


def _method(spec: RoutingSpec) -> str:
    if (
        spec.selection in {"scores_plus_bias", "logits_plus_bias"}
        and spec.family != "grouped_softmax"
    ):
        return "noaux_tc"
    return "group_limited_greedy" if spec.grouped else "greedy"


def _is_method(spec: RoutingSpec, value: object) -> bool:
    return spec.selection == "token_table" or value == _method(spec)


def _is_number(value: object, expected: float) -> bool:
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and float(value) == expected
    )


def _is_group_count(spec: RoutingSpec, value: object) -> bool:
    return _is_number(value, spec.num_groups) or (spec.num_groups == 1 and _is_number(value, 0))


SETTINGS = (
    Setting(
        (
            "scoring_func", "scoring_function", "score_func", "score_function",
            "moe_router_activation", "moe_router_activation_func", "moe_router_score_function",
            "router_score_function", "router_activation", "router_activation_func",
            "moe_score_func", "moe_score_function", "moe_gate_act", "gating_function",
            "expert_selection_fn",
        ),
        _is_score,
        lambda spec: spec.score,
    ),
    Setting(
        (
            "norm_topk_prob", "norm_topk", "route_norm", "norm_expert_weight", "moe_renormalize",
            "moe_router_renormalize", "normalize_expert_weights", "renormalize",
        ),
        lambda spec, value: isinstance(value, (bool, int)) and bool(value) == spec.renormalize,
        lambda spec: spec.renormalize,
    ),
    Setting(("topk_method", "moe_topk_method"), _is_method, _method),
    Setting(
        (
            "use_routing_bias", "use_expert_bias", "use_router_bias", "use_moe_router_bias",
            "moe_router_enable_expert_bias",
        ),
        lambda spec, value: isinstance(value, (bool, int)) and bool(value) == spec.needs_bias,
        lambda spec: spec.needs_bias,
    ),
    Setting(
        (
            "routed_scaling_factor", "route_scale", "router_scaling_factor",
            "moe_router_scaling_factor", "moe_routed_scaling_factor",
            "moe_router_topk_scaling_factor",
        ),
        lambda spec, value: _is_number(value, spec.scale),
        lambda spec: spec.scale,
    ),
    Setting(
        (
            "n_group", "num_expert_group", "num_expert_groups", "router_n_groups",
            "moe_router_num_groups",
        ),
        _is_group_count,
        lambda spec: spec.num_groups,
    ),
    Setting(
        ("topk_group", "num_limited_groups", "moe_router_group_topk"),
        lambda spec, value: not spec.grouped or _is_number(value, spec.topk_groups),
        lambda spec: spec.topk_groups,
    ),
    Setting(
        ("use_grouped_topk", "moe_use_grouped_topk"),
        lambda spec, value: bool(value) or not spec.grouped,
        lambda spec: spec.grouped,
    ),
    Setting(
        ("router_logit_softcapping", "moe_router_logit_softcapping"),
        lambda spec, value: _is_number(value, spec.logit_softcap or 0.0),
        lambda spec: spec.logit_softcap or 0.0,
    ),
    Setting(
        ("zero_expert_num",),
        lambda spec, value: _is_number(value, spec.zero_experts),
        lambda spec: spec.zero_experts,
    ),
    Setting(
        ("zero_expert_type",),
        lambda spec, value: not spec.zero_experts or value == "identity",
        lambda _: "identity",
    ),
)  # fmt: skip


def contradictions(
    spec: RoutingSpec, read: set[str], get: Callable[[str], object]
) -> Iterator[tuple[str, object, object]]:
    """Yield attribute, value and what the spec computes, for each attribute that says otherwise.

    :param read: the attributes that the preset follows; these cannot contradict it.
    :param get: returns the value of an attribute, ``None`` if it is missing or says nothing.
    """
    for setting in SETTINGS:
        for name in setting.names:
            if name not in read:
                value = get(name)
                if value is not None and not setting.holds(spec, value):
                    yield name, value, setting.expected(spec)
