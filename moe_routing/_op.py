"""The operators ``moe_routing::route``, ``route_training`` and ``route_backward``.

Tracing, tensor subclasses and exported programs call them.

A plain call never comes here: going through an operator costs more than choosing the backend. The
spec travels as its canonical JSON, so that an exported program can be loaded in another process,
where ``import moe_routing`` runs this file. It only registers, in a few milliseconds; what the
operators do is in ``_operators``, imported when one is called.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree

from moe_routing.gating import op as _gating  # noqa: F401 -- registers the operator of `gate`
from moe_routing.kernel import RoutingOutput
from moe_routing.permutation import op as _permutation  # noqa: F401 -- registers its operators
from moe_routing.planning import op as _planning  # noqa: F401 -- registers the operator of `plan`

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor
    from torch.autograd.function import FunctionCtx

# So that torch.export.save can write down a program that returns what routing returns.
_pytree._register_namedtuple(RoutingOutput, serialized_type_name="moe_routing.RoutingOutput")  # noqa: SLF001 -- torch.export's error message names it

# `int64_ids` rather than a ScalarType: a dtype takes the dispatcher longest of all types of
# arguments.
_LIBRARY = torch.library.Library("moe_routing", "DEF")
_SCHEMA = (
    "(Tensor logits, Tensor? per_expert_scale, Tensor? bias, Tensor? token_ids, "
    "Tensor? expert_table, Tensor? num_valid_tokens, Tensor? expert_map, str spec, int topk, "
    "bool int64_ids, str? backend, str? shadow=None, "
    "Tensor? ids=None) -> (Tensor weights, Tensor ids)"
)
_LIBRARY.define(f"route{_SCHEMA}", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.define(f"route_training{_SCHEMA}", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.define(
    "route_backward(Tensor grad_weights, Tensor logits, Tensor ids, Tensor? per_expert_scale, "
    "str spec, str? backend, bool replayed=False) "
    "-> (Tensor grad_logits, Tensor grad_per_expert_scale)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@cache
def _operators() -> ModuleType:
    from moe_routing import _operators

    return _operators


def _route(*arguments: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401 -- the operator's schema
    return _operators().route(*arguments)  # type: ignore[no-any-return] # typed there


def _route_training(*arguments: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401 -- the operator's schema
    return _operators().route(*arguments, training=True)  # type: ignore[no-any-return] # typed there


def _route_fake(*arguments: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401 -- the operator's schema
    return _operators().route_fake(*arguments)  # type: ignore[no-any-return] # typed there


def _route_backward(*arguments: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401 -- the operator's schema
    return _operators().route_backward(*arguments)  # type: ignore[no-any-return] # typed there


_LIBRARY.impl("route", _route, "CompositeExplicitAutograd")
_LIBRARY.impl("route", torch.library.fallthrough_kernel, "Autograd")  # nothing to record
_LIBRARY.impl("route_training", _route_training, "CompositeExplicitAutograd")
torch.library.register_fake("moe_routing::route", _route_fake, lib=_LIBRARY)
torch.library.register_fake("moe_routing::route_training", _route_fake, lib=_LIBRARY)
_LIBRARY.impl("route_backward", _route_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("moe_routing::route_backward", lib=_LIBRARY)
def _route_backward_fake(
    _grad_weights: Tensor,
    logits: Tensor,
    _ids: Tensor,
    per_expert_scale: Tensor | None,
    _spec: str,
    _backend: str | None,
    _replayed: bool = False,  # noqa: FBT001, FBT002 -- the operator's schema
) -> tuple[Tensor, Tensor]:
    scale = logits.new_empty(0) if per_expert_scale is None else per_expert_scale
    contiguous = torch.contiguous_format
    return torch.empty_like(logits, memory_format=contiguous), torch.empty_like(
        scale, memory_format=contiguous
    )


def _save(ctx: FunctionCtx, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, per_expert_scale = inputs[:2]
    ctx.spec, ctx.topk, ctx.backend = inputs[7], inputs[8], inputs[10]  # type: ignore[attr-defined]  # a bag by design
    ctx.replayed = inputs[12] is not None  # type: ignore[attr-defined]  # likewise
    ctx.save_for_backward(logits, per_expert_scale, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_weights: Tensor, _grad_ids: None) -> tuple[Tensor | None, ...]:  # noqa: ANN401 -- a bag by design
    logits, per_expert_scale, ids = ctx.saved_tensors
    # The columns after the K selected belong to shared experts, whose weights are constants.
    grad_logits, grad_scale = torch.ops.moe_routing.route_backward(
        grad_weights[:, : ctx.topk].contiguous(),
        logits,
        ids[:, : ctx.topk].contiguous(),
        per_expert_scale,
        ctx.spec,
        ctx.backend,
        ctx.replayed,
    )
    nothing = (None,) * 11
    return grad_logits, (None if per_expert_scale is None else grad_scale), *nothing


def _save_backward(
    ctx: FunctionCtx,
    inputs: tuple[Any, ...],
    output: tuple[Tensor, Tensor],  # noqa: ARG001 -- torch's protocol
) -> None:
    ctx.spec, ctx.replayed = inputs[4], inputs[6]  # type: ignore[attr-defined]  # a bag by design
    ctx.save_for_backward(*inputs[:4])


def _double_backward(ctx: Any, *directions: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 -- a bag by design
    return (
        *_operators().route_double_backward(
            ctx.spec, ctx.saved_tensors, directions, replayed=ctx.replayed
        ),
        None,
        None,
        None,
    )


torch.library.register_autograd(
    "moe_routing::route_training", _backward, setup_context=_save, lib=_LIBRARY
)
torch.library.register_autograd(
    "moe_routing::route_backward", _double_backward, setup_context=_save_backward, lib=_LIBRARY
)
