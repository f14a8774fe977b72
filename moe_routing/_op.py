"""The operators ``moe_routing::route``, ``route_training`` and ``route_backward``: what tracing and autograd see.

An ordinary call never comes here (a dispatch through the operator costs more than the choice of the backend); a traced
one, and one that wants gradients, does. The spec travels as its canonical JSON, so that an exported program can be
loaded in another process, where ``import moe_routing._op`` has registered the operators.
"""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_routing._backend import RoutingOutput
from moe_routing._binding import Binder, empty_output
from moe_routing.formula import weights_backward
from moe_routing_registry import RoutingSpec

if TYPE_CHECKING:
    from torch.autograd.function import FunctionCtx

# `int64_ids` rather than a ScalarType: of an argument's way through the dispatcher, that of a dtype takes longest.
_LIBRARY = torch.library.Library("moe_routing", "DEF")
_SCHEMA = (
    "(Tensor logits, Tensor? per_expert_scale, Tensor? bias, Tensor? token_ids, Tensor? expert_table, "
    "Tensor? num_valid_tokens, Tensor? expert_map, str spec, int topk, bool int64_ids, "
    "str? backend) -> (Tensor weights, Tensor ids)"
)
_LIBRARY.define(f"route{_SCHEMA}", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.define(f"route_training{_SCHEMA}", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.define(
    "route_backward(Tensor grad_weights, Tensor logits, Tensor ids, Tensor? per_expert_scale, str spec, str? backend) "
    "-> (Tensor grad_logits, Tensor grad_per_expert_scale)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def call(  # noqa: PLR0913, PLR0917 -- the router's operands
    spec: RoutingSpec,
    backend: str | None,
    logits: Tensor,
    topk: int,
    per_expert_scale: Tensor | None,
    bias: Tensor | None,
    token_ids: Tensor | None,
    expert_table: Tensor | None,
    num_valid_tokens: int | Tensor | None,
    expert_map: Tensor | None,
    ids_dtype: torch.dtype,
    out: RoutingOutput | None,
    *,
    training: bool,
) -> RoutingOutput:
    """Call an operator with checked arguments; the one with an autograd formula, which costs more, where it is wanted."""
    if num_valid_tokens is not None and not isinstance(num_valid_tokens, Tensor):
        num_valid_tokens = torch.full((1,), num_valid_tokens, dtype=torch.int64, device=logits.device)
    # The backward needs logical ids, so with gradients the map is applied behind the operator.
    inside_map = None if training else expert_map
    operator = torch.ops.moe_routing.route_training if training else torch.ops.moe_routing.route
    weights, ids = operator(
        logits, per_expert_scale, bias, token_ids, expert_table, num_valid_tokens, inside_map,
        spec.to_json(), topk, ids_dtype is torch.int64, backend,
    )  # fmt: skip
    if expert_map is not None and training:
        ids = torch.where(ids < 0, ids, expert_map[ids.clamp(min=0)].to(ids.dtype))
    if out is None:
        return RoutingOutput(weights, ids)
    out.weights.copy_(weights)
    out.ids.copy_(ids)
    return out


@cache
def binder_of(spec: str, backend: str | None) -> Binder:
    """Return what binds the operator's calls."""
    return Binder(RoutingSpec.from_json(spec), backend)


def _route(  # noqa: PLR0913, PLR0917 -- the operator's schema
    logits: Tensor,
    per_expert_scale: Tensor | None,
    bias: Tensor | None,
    token_ids: Tensor | None,
    expert_table: Tensor | None,
    num_valid_tokens: Tensor | None,
    expert_map: Tensor | None,
    spec: str,
    topk: int,
    int64_ids: bool,  # noqa: FBT001 -- likewise
    backend: str | None,
    *,
    training: bool = False,
) -> tuple[Tensor, Tensor]:
    return binder_of(spec, backend).route(
        logits, topk, per_expert_scale, bias, token_ids, expert_table, num_valid_tokens, expert_map,
        torch.int64 if int64_ids else torch.int32, None, training=training,
    )  # fmt: skip


def _route_fake(logits: Tensor, *operands: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401 -- the operator's schema
    spec, topk, int64_ids = operands[6:9]
    return empty_output(RoutingSpec.from_json(spec), logits, topk, torch.int64 if int64_ids else torch.int32)


_LIBRARY.impl("route", _route, "CompositeExplicitAutograd")
_LIBRARY.impl("route", torch.library.fallthrough_kernel, "Autograd")  # nothing to record
_LIBRARY.impl("route_training", partial(_route, training=True), "CompositeExplicitAutograd")
torch.library.register_fake("moe_routing::route", _route_fake, lib=_LIBRARY)
torch.library.register_fake("moe_routing::route_training", _route_fake, lib=_LIBRARY)


def _route_backward(  # noqa: PLR0913, PLR0917 -- the operator's schema
    grad_weights: Tensor, logits: Tensor, ids: Tensor, per_expert_scale: Tensor | None, spec: str, backend: str | None
) -> tuple[Tensor, Tensor]:
    binding = binder_of(spec, backend).binding_for(
        logits.device, logits.dtype, logits.shape[1], ids.shape[1], ids_dtype=ids.dtype, training=True,
        rows=logits.stride(1) == 1 or logits.shape[1] == 1,
    )  # fmt: skip
    backward = getattr(binding.bound, "backward", None)
    if backward is not None and logits.shape[0]:
        fused: tuple[Tensor, Tensor] = backward(grad_weights, logits, ids, per_expert_scale)
        return fused
    return weights_backward(RoutingSpec.from_json(spec), grad_weights, logits, ids, per_expert_scale)


_LIBRARY.impl("route_backward", _route_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("moe_routing::route_backward", lib=_LIBRARY)
def _route_backward_fake(
    _grad_weights: Tensor, logits: Tensor, _ids: Tensor, per_expert_scale: Tensor | None, _spec: str, _backend: str | None
) -> tuple[Tensor, Tensor]:
    scale = logits.new_empty(0) if per_expert_scale is None else torch.empty_like(per_expert_scale)
    return torch.empty_like(logits, memory_format=torch.contiguous_format), scale


def _save(ctx: FunctionCtx, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, per_expert_scale = inputs[:2]
    ctx.spec, ctx.topk, ctx.backend = inputs[7], inputs[8], inputs[10]  # type: ignore[attr-defined]  # a bag by design
    ctx.save_for_backward(logits, per_expert_scale, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_weights: Tensor, _grad_ids: None) -> tuple[Tensor | None, ...]:  # noqa: ANN401 -- a bag by design
    logits, per_expert_scale, ids = ctx.saved_tensors
    # Shared-expert slots stand behind the K selected and have constant weights.
    grad_logits, grad_scale = torch.ops.moe_routing.route_backward(
        grad_weights[:, : ctx.topk].contiguous(),
        logits,
        ids[:, : ctx.topk].contiguous(),
        per_expert_scale,
        ctx.spec,
        ctx.backend,
    )
    nothing = (None,) * 9
    return grad_logits, (None if per_expert_scale is None else grad_scale), *nothing


torch.library.register_autograd("moe_routing::route_training", _backward, setup_context=_save, lib=_LIBRARY)
