"""Which routers of vLLM can be replaced, and by which formula; of the others, why not."""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeAlias

from moe_routing.families import FAMILIES
from moe_routing.integrations._code import described
from moe_routing.integrations.vllm._bodies import ROUTERS, is_from, why_left

if TYPE_CHECKING:
    from collections.abc import Callable

    from moe_routing_registry import RoutingSpec

VllmRouter: TypeAlias = Any
"""An object of vLLM, whose types are not there when this is checked."""
_PACKAGE = f"vllm.{ROUTERS.replace('/', '.')}."
_GEMMA4 = ("vllm.model_executor.models.gemma4", "Gemma4Router.routing_function")


@dataclass(frozen=True, slots=True)
class Plan:
    """How a router of vLLM is replaced.

    :ivar spec: its maths.
    :ivar scale_owner: the module whose ``per_expert_scale`` is read at every call, for Gemma4.
    :ivar blanks_padding: whether rows that the forward context calls padding get ids -1 and weights
        0.
    """

    spec: RoutingSpec
    scale_owner: Any = None
    blanks_padding: bool = False


class _LeftAloneError(Exception):
    """A router stays as vLLM made it, for the reason in the message."""


def plan(router: VllmRouter, num_experts: int) -> Plan | str:
    """Say how a router that vLLM's factory made is replaced, or in a sentence why it is left alone.

    A class that is not known exactly, a subclass for example, is left alone, and so is one whose
    code is not what was read, on disk or in memory: only what was read is replaced.

    :param num_experts: columns of the logits that it will get.
    """
    name = f"{type(router).__module__}.{type(router).__qualname__}".removeprefix(_PACKAGE)
    try:
        _refuse_unknown(name, router)
        made = _RULES[name](router, num_experts)
        made.spec.check_size(num_experts, router.top_k)
    except _LeftAloneError as reason:
        return str(reason)
    except (
        ValueError
    ) as error:  # more experts than the groups hold: vLLM's own answer to that stands
        return str(error)
    return made


def _refuse_unknown(name: str, router: VllmRouter) -> None:
    reason = _KEPT.get(name, "")
    if not reason and name not in _RULES:
        reason = "this class is not known"
    elif not reason and "_compute_routing" in vars(router):
        reason = (
            "its _compute_routing was replaced before, by "
            f"{described(vars(router)['_compute_routing'])}"
        )
    if reason := reason or why_left(name):
        raise _LeftAloneError(reason)


def _top_k(router: VllmRouter, _num_experts: int) -> Plan:
    _refuse_aiter()
    family = {"softmax": "softmax_topk", "sigmoid": "sigmoid_topk"}[router.scoring_func]
    return Plan(FAMILIES[family].spec.replace(renormalize=router.renormalize), blanks_padding=True)


def _bias(router: VllmRouter, _num_experts: int) -> Plan:
    _refuse_aiter()
    if router._hash_indices_table is not None:  # noqa: SLF001 -- it has no public name
        msg = "experts come from a table of token ids, whose kernel skips the ids of padding"
        raise _LeftAloneError(msg)
    if router.num_fused_shared_experts:
        msg = "shared experts ride in its fused kernel"
        raise _LeftAloneError(msg)
    return Plan(_biased(router, router.scoring_func), blanks_padding=True)


def _grouped(router: VllmRouter, num_experts: int) -> Plan:
    _refuse_aiter()
    if num_experts <= router.num_expert_group:
        msg = (
            f"{num_experts} experts make no {router.num_expert_group} groups, and vLLM then "
            "ignores the groups"
        )
        raise _LeftAloneError(msg)
    return Plan(_groups(router), blanks_padding=router.skip_padding)


def _cpu(router: VllmRouter, num_experts: int) -> Plan:
    if router.use_grouped_topk:
        return Plan(_groups(router))
    if router.scoring_func == "sqrtsoftplus" and router._hash_indices_table is None:  # noqa: SLF001 -- likewise
        return Plan(_biased(router, router.scoring_func))
    if router.custom_routing_function is not None:
        return _custom(router, num_experts)
    if router.scoring_func != "softmax" or router.e_score_correction_bias is not None:
        msg = (
            f"vLLM routes {router.scoring_func} with a bias or a table otherwise on a CPU than on "
            "a GPU"
        )
        raise _LeftAloneError(msg)
    return Plan(FAMILIES["softmax_topk"].spec.replace(renormalize=router.renormalize))


def _custom(router: VllmRouter, _num_experts: int) -> Plan:
    function = router.custom_routing_function
    module, name = _GEMMA4
    if not (
        isinstance(function, MethodType)
        and function.__qualname__ == name
        and is_from(module, function.__func__)
    ):
        msg = (
            f"{described(function)} is the model's own function; vLLM knows some by identity and "
            "fuses them with the experts"
        )
        raise _LeftAloneError(msg)
    if reason := why_left("gemma4.Gemma4Router"):
        raise _LeftAloneError(reason)
    return Plan(FAMILIES["gemma4"].spec, scale_owner=function.__self__)


def _biased(router: VllmRouter, score: str) -> RoutingSpec:
    family = {
        "softmax": "softmax_bias_topk",
        "sigmoid": "sigmoid_bias_topk",
        "sqrtsoftplus": "sqrtsoftplus_bias",
    }[score]
    spec = FAMILIES[family].spec
    return spec.replace(renormalize=router.renormalize, scale=float(router.routed_scaling_factor))


def _groups(router: VllmRouter) -> RoutingSpec:
    """Return grouped top-k's maths.

    Groups by the sum of the best two biased scores, by the maximum without a bias.
    """
    biased = router.e_score_correction_bias is not None
    spec = FAMILIES["grouped_sigmoid_bias" if biased else "grouped_softmax"].spec
    return spec.replace(
        score=router.scoring_func,
        renormalize=router.renormalize,
        scale=float(router.routed_scaling_factor),
        num_groups=router.num_expert_group,
        topk_groups=router.topk_group,
    )


def _refuse_aiter() -> None:
    from vllm._aiter_ops import rocm_aiter_ops

    if rocm_aiter_ops.is_fused_moe_enabled():
        msg = "AITER's fused routing is switched on"
        raise _LeftAloneError(msg)


_RULES: dict[str, Callable[[VllmRouter, int], Plan]] = {
    "fused_topk_router.FusedTopKRouter": _top_k,
    "fused_topk_bias_router.FusedTopKBiasRouter": _bias,
    "grouped_topk_router.GroupedTopKRouter": _grouped,
    "cpu_router.CPURouter": _cpu,
    "custom_routing_router.CustomRoutingRouter": _custom,
}
_KEPT = {
    "zero_expert_router.ZeroExpertRouter": "it computes the zero experts' output on the way",
    "routing_simulator_router.RoutingSimulatorRouter": "simulated routing was asked for",
    "aiter_shared_routed_fused_moe_router.AiterSharedRoutedFusedMoERouter": (
        "shared experts ride in its fused kernel"
    ),
}
