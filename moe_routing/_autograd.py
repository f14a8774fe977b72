"""Gradients of routing.

What a plain call records, what ``torch.func`` transforms, and the derivative of the gradient.

The weights are differentiable in the logits and in ``per_expert_scale``; the selection is a
constant. The first derivative is the kernel's own backward or the closed form
``moe_routing.formula.weights_backward``. All further derivatives, forward ones too, are those of
the closed form, which is made of PyTorch operations: they are the same on every backend.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from moe_routing.formula import weights_backward
from moe_routing.kernel import Operands, RoutingOutput
from moe_routing.private_api import knows_its_signature

if TYPE_CHECKING:
    from moe_routing.kernel import Prepared
    from moe_routing_registry import RoutingSpec

Gradients = tuple[Tensor, Tensor]
"""Of the logits, and of the scale (empty if there is none)."""
Backward = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Gradients]
"""``backward(grad_weights [T, K], logits [T, E], ids [T, K], per_expert_scale [E] or None)``.

``grad_weights`` and ``ids`` are contiguous.
"""
_tuple = tuple.__new__


class Rule(NamedTuple):
    """How to go back through a call.

    :ivar spec: the maths, for the derivatives that the closed form serves.
    :ivar topk: K; the columns after the K selected belong to shared experts, whose weights are
        constants.
    :ivar backward: returns the first derivative.
    :ivar replayed: whether ids were recorded, so that single slots of a row may have no expert.
    """

    spec: RoutingSpec
    topk: int
    backward: Backward
    replayed: bool


def recorded(rule: Rule, route: Prepared) -> Prepared:
    """Return what routes and records the derivatives.

    ``expert_map`` is applied to the outputs, for the derivatives need logical ids.
    """

    def call(operands: Operands) -> RoutingOutput:
        logits, scale, bias, token_ids, expert_table, valid, expert_map, ids, _ = operands
        output: tuple[Tensor, Tensor] = Routing.apply(
            rule, route, logits, scale, bias, token_ids, expert_table, valid, ids
        )
        if expert_map is not None:
            return RoutingOutput(output[0], apply_map(output[1], expert_map))
        return _tuple(RoutingOutput, output)

    return call


def apply_map(ids: Tensor, expert_map: Tensor) -> Tensor:
    """Map logical to physical ids, but for the -1 of padding and of slots without an expert."""
    return torch.where(ids < 0, ids, expert_map[ids.clamp(min=0)].to(ids.dtype))


@knows_its_signature
class Routing(torch.autograd.Function):
    """``weights, ids = Routing.apply(rule, route, *operands)``.

    The operands come without ``expert_map`` and ``out``.
    """

    @staticmethod
    def forward(rule: Rule, route: Prepared, *operands: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG004, ANN401 -- torch's protocol
        """Route tensors that no transform wraps."""
        *given, recorded = operands
        weights, ids = route(_tuple(Operands, (*given, None, recorded, None)))
        return weights, ids

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ANN401 -- a bag by design
        """Keep what the derivatives need."""
        rule, _, logits, scale = inputs[:4]
        ctx.rule = rule
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(logits, scale, output[1])
        ctx.save_for_forward(logits, scale, output[1])

    @staticmethod
    def backward(ctx: Any, grad_weights: Tensor, _grad_ids: None) -> tuple[Any, ...]:  # noqa: ANN401 -- a bag by design
        """Go back through the weights."""
        logits, scale, ids = ctx.saved_tensors
        topk = ctx.rule.topk
        if (
            ids.shape[1] > topk
        ):  # a slice of everything is an alias, for which `is_grads_batched` has no rule
            grad_weights, ids = grad_weights[:, :topk], ids[:, :topk]
        grad_logits, grad_scale = RoutingBackward.apply(ctx.rule, grad_weights, logits, ids, scale)
        return (
            None,
            None,
            grad_logits,
            None if scale is None else grad_scale,
            None,
            None,
            None,
            None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None]:  # noqa: ANN401 -- a bag by design
        """Return the tangent of the weights."""
        logits, scale, ids = ctx.saved_tensors
        chosen = ids[:, : ctx.rule.topk]
        directions = (
            _or_zeros(tangents[2], logits),
            logits.new_empty(0) if scale is None else _or_zeros(tangents[3], scale),
        )

        # The gradient is linear in the gradient of the weights, and its matrix is the transpose of
        # the one wanted here.
        def gradient(grad_weights: Tensor) -> Gradients:
            return weights_backward(
                ctx.rule.spec, grad_weights, logits, chosen, scale, absent=ctx.rule.replayed
            )

        zeros = torch.zeros(chosen.shape, dtype=torch.float32, device=logits.device)
        tangent = torch.func.vjp(gradient, zeros)[1](directions)[0]
        constant = tangent.new_zeros(len(ids), ids.shape[1] - ctx.rule.topk)
        return torch.cat([tangent, constant], dim=-1), None

    @staticmethod
    def vmap(
        info: Any,  # noqa: ANN401 -- torch's protocol
        in_dims: tuple[Any, ...],
        rule: Rule,
        route: Prepared,
        *operands: Any,  # noqa: ANN401 -- likewise
    ) -> Any:  # noqa: ANN401 -- torch's protocol
        """Route a batch of calls.

        They are routed at once if only operands with a row for each token are batched, and
        otherwise one by one.
        """
        size, dims, (logits, scale, bias, token_ids, expert_table, valid, ids) = (
            info.batch_size,
            in_dims[2:],
            operands,
        )
        if valid is None and dims[1] is dims[2] is dims[4] is None:
            flat = (
                _flat(size, logits, dims[0]),
                scale,
                bias,
                _flat(size, token_ids, dims[3]),
                expert_table,
                None,
                _flat(size, ids, dims[6]),
            )
            return tuple(_unflat(size, t) for t in Routing.apply(rule, route, *flat)), (0, 0)
        return _one_by_one(size, dims, operands, partial(Routing.apply, rule, route))


@knows_its_signature
class RoutingBackward(torch.autograd.Function):
    """The first derivative of ``Routing``, which has derivatives itself.

    ``grad_logits, grad_scale = RoutingBackward.apply(rule, grad_weights, logits, ids,
    per_expert_scale)``.
    """

    @staticmethod
    def forward(
        rule: Rule,
        grad_weights: Tensor,
        logits: Tensor,
        ids: Tensor,
        per_expert_scale: Tensor | None,
    ) -> Gradients:
        """Return the first derivative."""
        return rule.backward(
            grad_weights.resolve_neg().contiguous(), logits, ids.contiguous(), per_expert_scale
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Gradients) -> None:  # noqa: ARG004, ANN401 -- torch's protocol
        """Keep the inputs."""
        ctx.rule = inputs[0]
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *directions: Tensor) -> tuple[Any, ...]:  # noqa: ANN401 -- a bag by design
        """Go back through the gradient."""
        rule = ctx.rule
        gradients = double_backward(rule.spec, ctx.saved_tensors, directions, absent=rule.replayed)
        return (None, *gradients)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Gradients:  # noqa: ANN401 -- a bag by design
        """Return the tangents of the gradient."""
        rule = ctx.rule
        gradient, inputs = _as_function(rule.spec, *ctx.saved_tensors, absent=rule.replayed)
        given = (tangents[1], tangents[2], tangents[4])
        along = tuple(_or_zeros(t, x) for t, x in zip(given, inputs, strict=False))
        derivative: Gradients = torch.func.jvp(gradient, inputs, along)[1]
        return derivative

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], rule: Rule, *operands: Any) -> Any:  # noqa: ANN401 -- torch's protocol
        """Go back through a batch.

        The calls go at once without a scale, and otherwise one by one: the gradient of a scale is a
        sum over the tokens of one call.
        """
        size, dims = info.batch_size, in_dims[1:]
        if operands[3] is None:
            flat = (_flat(size, t, d) for t, d in zip(operands[:3], dims[:3], strict=True))
            grad_logits, nothing = RoutingBackward.apply(rule, *flat, None)
            return (_unflat(size, grad_logits), nothing), (0, None)
        return _one_by_one(size, dims, operands, partial(RoutingBackward.apply, rule))


def double_backward(
    spec: RoutingSpec,
    saved: tuple[Tensor, Tensor, Tensor, Tensor | None],
    directions: tuple[Tensor | None, ...],
    *,
    absent: bool,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the inputs of the first derivative.

    :param saved: the inputs: ``grad_weights``, ``logits``, ``ids`` and ``per_expert_scale``.
    :param directions: gradients of what ``RoutingBackward`` returned; ``None`` counts as zero.
    :param absent: as of ``weights_backward``.
    """
    gradient, inputs = _as_function(spec, *saved, absent=absent)
    outputs, pull = torch.func.vjp(gradient, *inputs)[:2]
    found = pull(tuple(_or_zeros(d, o) for d, o in zip(directions, outputs, strict=True)))
    return found[0], found[1], None, found[2] if len(inputs) > 2 else None  # noqa: PLR2004 -- the scale is the third


def _as_function(  # noqa: PLR0913 -- what a gradient depends on
    spec: RoutingSpec,
    grad_weights: Tensor,
    logits: Tensor,
    ids: Tensor,
    per_expert_scale: Tensor | None,
    *,
    absent: bool,
) -> tuple[Callable[..., Gradients], tuple[Tensor, ...]]:
    """Return the closed form as a function of its differentiable inputs, and those."""

    def gradient(grad_weights: Tensor, logits: Tensor, scale: Tensor | None = None) -> Gradients:
        return weights_backward(spec, grad_weights, logits, ids, scale, absent=absent)

    scale = () if per_expert_scale is None else (per_expert_scale,)
    return gradient, (grad_weights, logits, *scale)


def _or_zeros(direction: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if direction is None else direction.to(like.dtype)


def _flat(batch: int, operand: Tensor | None, dim: int | None) -> Tensor | None:
    """Turn ``[B, T, ...]`` into ``[B * T, ...]``.

    ``[T, ...]``, which is the same for the whole batch, is repeated B times.
    """
    if operand is None:
        return None
    return (
        operand.expand(batch, *operand.shape) if dim is None else operand.movedim(dim, 0)
    ).flatten(0, 1)


def _unflat(batch: int, result: Tensor) -> Tensor:
    return result.view(batch, len(result) // batch, *result.shape[1:])


def _one_by_one(
    batch: int, dims: tuple[Any, ...], operands: tuple[Any, ...], call: Callable[..., Any]
) -> Any:  # noqa: ANN401 -- torch's protocol
    """Call for each element of a batch, and stack the results."""
    results = [
        call(*(o if d is None else o.select(d, b) for o, d in zip(operands, dims, strict=True)))
        for b in range(batch)
    ]
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0, 0)
