"""What the operators of ``_op`` do, and how the router calls them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from moe_routing._autograd import apply_map, double_backward
from moe_routing._dispatch import dispatcher_of, empty_output
from moe_routing.formula import weights_backward
from moe_routing.kernel import NO_OPERANDS, REPLAY, Operands, RoutingOutput, replaced

if TYPE_CHECKING:
    from moe_routing.reference.shadow import Shadow


class CallConfig(NamedTuple):
    """What of a call is no tensor.

    :ivar spec: the spec's canonical JSON.
    :ivar backend: the backend that the user named, if any.
    :ivar shadow: the key of what watches the router's calls, if anything does
        (``moe_routing.reference.shadow``).
    """

    spec: str
    backend: str | None
    topk: int
    ids_dtype: torch.dtype
    shadow: str | None = None


def call(config: CallConfig, operands: Operands, *, training: bool) -> RoutingOutput:
    """Call an operator with checked arguments.

    The operator with an autograd formula costs more, and is called only for gradients.
    """
    valid, expert_map, out = operands.num_valid_tokens, operands.expert_map, operands.out
    if valid is not None and not isinstance(valid, Tensor):
        valid = operands.logits.new_full((1,), valid, dtype=torch.int64)
    # The backward needs logical ids, so with gradients the map is applied after the operator.
    inside_map = None if training else expert_map
    operator = torch.ops.moe_routing.route_training if training else torch.ops.moe_routing.route
    inside = replaced(operands, num_valid_tokens=valid, expert_map=inside_map)
    weights, ids = operator(*arguments(config, inside))
    if training and expert_map is not None:
        ids = apply_map(ids, expert_map)
    if out is None:
        return RoutingOutput(weights, ids)
    out.weights.copy_(weights)
    out.ids.copy_(ids)
    return out


def arguments(config: CallConfig, operands: Operands) -> tuple[Any, ...]:
    """Return the arguments of ``route`` and ``route_training``, in the order of their schema."""
    int64_ids = config.ids_dtype is torch.int64
    *tensors, recorded, _out = operands
    return (
        *tensors, config.spec, config.topk, int64_ids, config.backend, config.shadow,
        recorded,
    )  # fmt: skip


def route(  # noqa: PLR0913, PLR0917 -- the operator's schema
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
    shadow: str | None = None,
    recorded: Tensor | None = None,
    *,
    training: bool = False,
) -> tuple[Tensor, Tensor]:
    """Route real tensors: choose or find the kernel, and check its outputs.

    They must be what the fake kernel says.
    """
    dispatcher = dispatcher_of(spec, backend)
    ids_dtype = torch.int64 if int64_ids else torch.int32
    num_tokens, num_experts = logits.shape
    if not num_tokens:
        return empty_output(dispatcher.spec, logits, topk, ids_dtype)
    operands = Operands(
        logits,
        per_expert_scale,
        bias,
        token_ids,
        expert_table,
        num_valid_tokens,
        expert_map,
        recorded,
    )
    resolved = dispatcher.resolve_for(
        logits, num_experts, topk, ids_dtype, training, operands.optional
    )
    watch = None if shadow is None else _shadow(shadow)
    weights, ids = resolved.route(operands, watch)
    # A third party's kernel may return a view; compiled code has been told that it is contiguous.
    return weights.contiguous(), ids.contiguous()


def _shadow(key: str) -> Shadow | None:
    from moe_routing.reference.shadow import shadow_of

    return shadow_of(key)


def route_fake(logits: Tensor, *others: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401 -- the operator's schema
    """Return outputs of the right shapes for fake tensors."""
    spec, topk, int64_ids = others[6:9]
    return empty_output(
        dispatcher_of(spec, None).spec, logits, topk, torch.int64 if int64_ids else torch.int32
    )


def route_backward(  # noqa: PLR0913, PLR0917 -- the operator's schema
    grad_weights: Tensor,
    logits: Tensor,
    ids: Tensor,
    per_expert_scale: Tensor | None,
    spec: str,
    backend: str | None,
    replayed: bool = False,  # noqa: FBT001, FBT002 -- likewise
) -> tuple[Tensor, Tensor]:
    dispatcher = dispatcher_of(spec, backend)
    if logits.shape[0]:
        resolved = dispatcher.resolve_for(
            logits,
            logits.shape[1],
            ids.shape[1],
            ids.dtype,
            True,  # noqa: FBT003 -- training
            REPLAY if replayed else NO_OPERANDS,
        )
        gradients = resolved.backward(
            grad_weights.contiguous(), logits, ids.contiguous(), per_expert_scale
        )
    else:
        gradients = weights_backward(dispatcher.spec, grad_weights, logits, ids, per_expert_scale)
    return gradients[0].contiguous(), gradients[1].contiguous()


def route_double_backward(
    spec: str,
    saved: tuple[Tensor, Tensor, Tensor, Tensor | None],
    directions: tuple[Tensor | None, ...],
    *,
    replayed: bool,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the tensors that ``route_backward`` took."""
    return double_backward(dispatcher_of(spec, None).spec, saved, directions, absent=replayed)
