"""The operator ``moe_routing::gate``.

Tracing, gradients, tensor subclasses and exported programs call it. It always returns the logits,
from which its gradient is computed; ids are logical ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree

from moe_routing.gating.kernel import GateOutput, Projection
from moe_routing.kernel import Operands

if TYPE_CHECKING:
    from torch import Tensor
    from torch.autograd.function import FunctionCtx

    from moe_routing.gating.call import GateConfig

# So that torch.export.save can write down a program that returns what `gate` returns.
_pytree._register_namedtuple(GateOutput, serialized_type_name="moe_routing.GateOutput")  # noqa: SLF001 -- torch.export's error message names it

_LIBRARY = torch.library.Library("moe_routing", "FRAGMENT")
_LIBRARY.define(
    "gate(Tensor hidden, Tensor router_weight, Tensor? router_bias, Tensor? norm_weight, "
    "Tensor? input_scale, float? eps, float multiplier, Tensor? per_expert_scale, Tensor? bias, "
    "Tensor? token_ids, Tensor? expert_table, Tensor? num_valid_tokens, Tensor? ids, str spec, "
    "int topk, bool int64_ids, str logits_dtype, bool invariant, str? backend, str? shadow, "
    "bool training) -> (Tensor weights, Tensor ids, Tensor logits)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_PARTS = len(Projection._fields)
_ROUTED = 6
"""Tensors that routing takes, after those of the projection."""


def gate(projection: Projection, routed: Operands, config: GateConfig) -> GateOutput:
    """Call the operator with checked arguments; the ids that it returns are logical."""
    made = torch.ops.moe_routing.gate(*arguments(projection, routed, config))
    return GateOutput(*made)


def arguments(projection: Projection, routed: Operands, config: GateConfig) -> tuple[Any, ...]:
    """Return the arguments in the order of the schema."""
    _, *others = routed
    return (
        *projection, *others[: _ROUTED - 1], routed.ids, config.spec, config.topk,
        config.ids_dtype is torch.int64, str(config.logits_dtype).removeprefix("torch."),
        config.invariant, config.backend, config.shadow, config.training,
    )  # fmt: skip


def _gate(*given: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN401 -- the operator's schema
    from moe_routing.gating.call import GateConfig, run

    projection = Projection(*given[:_PARTS])
    *tensors, ids = given[_PARTS : _PARTS + _ROUTED]
    routed = Operands(projection.hidden, *tensors)._replace(ids=ids)
    spec, topk, int64_ids, logits_dtype, *others = given[_PARTS + _ROUTED :]
    ids_dtype = torch.int64 if int64_ids else torch.int32
    made = run(
        projection, routed, GateConfig(spec, topk, ids_dtype, getattr(torch, logits_dtype), *others)
    )
    # A third party's kernel may return a view; compiled code has been told that it is contiguous.
    return made.weights.contiguous(), made.ids.contiguous(), made.logits


def _gate_fake(*given: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN401 -- likewise
    from moe_routing._dispatch import dispatcher_of, empty_output

    hidden, weight = given[:2]
    spec, topk, int64_ids, logits_dtype = given[_PARTS + _ROUTED :][:4]
    shape = (hidden.shape[0], weight.shape[0])
    logits = hidden.new_empty(shape, dtype=getattr(torch, logits_dtype))
    ids_dtype = torch.int64 if int64_ids else torch.int32
    return (*empty_output(dispatcher_of(spec, None).spec, logits, topk, ids_dtype), logits)


def _save(ctx: FunctionCtx, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    per_expert_scale, spec, topk, backend = (
        inputs[_PARTS], *inputs[_PARTS + _ROUTED :][:2], inputs[-3],
    )  # fmt: skip
    ctx.save_for_backward(*inputs[: _PARTS - 2], per_expert_scale, *output[1:])
    ctx.numbers, ctx.routing = inputs[_PARTS - 2 : _PARTS], (spec, topk, backend)  # type: ignore[attr-defined] # a bag by design
    ctx.replayed = inputs[_PARTS + _ROUTED - 1] is not None  # type: ignore[attr-defined] # likewise
    ctx.mark_non_differentiable(output[1])


def _backward(
    ctx: Any,  # noqa: ANN401 -- a bag by design
    grad_weights: Tensor,
    _grad_ids: None,
    grad_logits: Tensor,
) -> tuple[Tensor | None, ...]:
    from moe_routing.formula.gate import in_full, logits_backward
    from moe_routing.gating.call import who_routes

    *tensors, per_expert_scale, ids, logits = ctx.saved_tensors
    spec, topk, backend = ctx.routing
    # The columns after the K selected belong to shared experts, whose weights are constants.
    of_logits, of_scale = torch.ops.moe_routing.route_backward(
        grad_weights[:, :topk].contiguous(), logits, ids[:, :topk].contiguous(), per_expert_scale,
        spec, who_routes(backend), ctx.replayed,
    )  # fmt: skip
    projection = Projection(*tensors, *ctx.numbers)
    with in_full(projection.hidden.device):
        gradients = logits_backward(projection, of_logits.float() + grad_logits.float())
    of_scale = None if per_expert_scale is None else of_scale
    return (*gradients, None, None, of_scale, *((None,) * 13))


_LIBRARY.impl("gate", _gate, "CompositeExplicitAutograd")
torch.library.register_fake("moe_routing::gate", _gate_fake, lib=_LIBRARY)
torch.library.register_autograd("moe_routing::gate", _backward, setup_context=_save, lib=_LIBRARY)
