"""``register``, the plug-in itself.

Every router that vLLM's factory makes is looked at, and routed by us if it is known.
"""

from __future__ import annotations

import functools
import logging
import warnings
from typing import TYPE_CHECKING, Any

from moe_routing.integrations.vllm._report import STATE, site_of
from moe_routing.integrations.vllm.patch_points import PLUGIN, VARIABLE, look
from moe_routing_registry.errors import PluginWarning
from moe_routing_registry.request import flag

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from moe_routing.integrations.vllm._report import Site
    from moe_routing.integrations.vllm._rules import Plan, VllmRouter

_log = logging.getLogger(
    "vllm.moe_routing"
)  # below "vllm", so that its lines stand among vLLM's own


def register() -> None:
    """Route through ``moe_routing`` in the routers that vLLM builds from now on in this process.

    Nothing happens unless ``MOE_ROUTING_VLLM=1``. vLLM calls it in every process; further calls
    change nothing. On a vLLM whose version or signatures are not those that were read nothing is
    replaced, and one ``PluginWarning`` says so.

    :raises ValueError: the variable is neither yes nor no.

    >>> register()  # the variable is not set
    """
    if STATE.active or STATE.refusal or not flag(VARIABLE):
        return
    found = look()
    if found is None or found.problems:
        STATE.refusal = "vLLM is not installed" if found is None else "; ".join(found.problems)
        text = f"{PLUGIN}: nothing of vLLM is replaced: {STATE.refusal}; {VARIABLE}=0 silences this"
        warnings.warn(text, PluginWarning, stacklevel=2)
        return
    from vllm.model_executor.layers.fused_moe import layer

    layer.create_fused_moe_router = _watching(layer.create_fused_moe_router)
    STATE.active = True
    _log.info(
        "%s: routers of vLLM %s are routed by moe_routing where they are known",
        PLUGIN,
        found.version,
    )


def _watching(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap vLLM's factory; the objects that it returns are still its own.

    One method of each instance is replaced.
    """

    @functools.wraps(factory)
    def create(top_k: int, global_num_experts: int, *arguments: Any, **named: Any) -> VllmRouter:  # noqa: ANN401 -- whatever vLLM's callers pass
        router = factory(top_k, global_num_experts, *arguments, **named)
        replace(router, named.get("num_logical_experts") or global_num_experts)
        return router

    return create


def replace(router: VllmRouter, num_experts: int) -> None:
    """Replace how one router of vLLM computes, if it is known; log and count either way.

    Only ``_compute_routing`` of the instance changes: around it vLLM captures the ids, maps them to
    physical experts and casts them, and its class, by which vLLM picks kernels for the experts,
    stays.

    :param num_experts: columns of the logits that it will get.
    """
    from moe_routing.integrations.vllm._rules import plan

    name = type(router).__qualname__
    made = plan(router, num_experts)
    if isinstance(made, str):
        _, new = site_of(name, reason=made)
        if new:
            _log.info("%s: %s is left alone: %s", PLUGIN, name, made)
        return
    site, new = site_of(name, formula=made.spec.formula)
    if new:
        _log.info("%s: %s now computes %s", PLUGIN, name, made.spec.formula)
    router._compute_routing = _computing(router, made, site)  # noqa: SLF001 -- the one patch point below mapping and capture


def _computing(
    router: VllmRouter, plan: Plan, site: Site
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Return the function that takes the place of the router's ``_compute_routing``."""
    import torch

    from moe_routing import get_router
    from moe_routing.integrations.vllm._padding import route_and_blank, rule

    route = get_router(plan.spec)
    own = router._compute_routing  # noqa: SLF001 -- likewise
    needs_bias, owner = plan.spec.needs_bias, plan.scale_owner
    mask_of = rule() if plan.blanks_padding else None

    def compute(
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        indices_type: torch.dtype | None,
        *,
        input_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if (
            router.bias_vl is not None
        ):  # a model may attach it later: image tokens are then selected by another bias
            own_result: tuple[torch.Tensor, torch.Tensor] = own(
                hidden_states, router_logits, indices_type, input_ids=input_ids
            )
            return own_result
        if not torch.compiler.is_compiling():  # a count in a traced graph would be a guard on it
            site.calls += 1
        scale = None if owner is None else owner.per_expert_scale
        bias = router.e_score_correction_bias if needs_bias else None
        ids_dtype = (
            torch.int64 if indices_type is torch.int64 else torch.int32
        )  # vLLM casts to the rarer ones
        if mask_of is not None and (mask := mask_of(router_logits.shape[0])) is not None:
            return route_and_blank(
                route, router_logits, router.top_k, bias=bias, ids_dtype=ids_dtype, mask=mask
            )
        weights, ids = route(router_logits, router.top_k, scale, bias=bias, ids_dtype=ids_dtype)
        return (
            weights.contiguous(),
            ids.contiguous(),
        )  # no copy, but for a backend that returns views: experts read them flat

    return compute
