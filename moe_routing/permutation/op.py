"""The operators ``moe_routing::permute``, ``combine`` and ``combine_backward``.

Tracing, gradients, tensor subclasses and exported programs call them. The gradient of each is made
of the three, so there are gradients of every order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree

from moe_routing.permutation.kernel import PermutedRows
from moe_routing.planning.kernel import DispatchPlan

if TYPE_CHECKING:
    from torch import Tensor
    from torch.autograd.function import FunctionCtx

# So that torch.export.save can write down a program that returns what `permute` returns.
_pytree._register_namedtuple(PermutedRows, serialized_type_name="moe_routing.PermutedRows")  # noqa: SLF001 -- torch.export's error message names it

_LIBRARY = torch.library.Library("moe_routing", "FRAGMENT")
_PLAN = "Tensor order, Tensor inverse, Tensor counts, Tensor offsets"
_TAGS = (torch.Tag.pt2_compliant_tag,)
_LIBRARY.define(
    f"permute(Tensor hidden, {_PLAN}, str layout, str quantize, str? backend) "
    "-> (Tensor rows, Tensor scales)",
    tags=_TAGS,
)
_LIBRARY.define(
    f"combine(Tensor rows, {_PLAN}, Tensor? weights, str? backend) -> Tensor", tags=_TAGS
)
_LIBRARY.define(
    f"combine_backward(Tensor grad, Tensor rows, {_PLAN}, Tensor? weights, str? backend) "
    "-> (Tensor grad_rows, Tensor grad_weights)",
    tags=_TAGS,
)
_NO_GRADIENTS = (None,) * 4
"""Of the parts of a plan."""


def parts(plan: DispatchPlan) -> tuple[Tensor, ...]:
    """Return the parts of a plan that move rows. Dynamo of PyTorch 2.8 does not trace slices."""
    return plan.order, plan.inverse, plan.counts, plan.offsets


def permute(
    hidden: Tensor, plan: DispatchPlan, layout: str, quantize: str, backend: str | None
) -> tuple[Tensor, Tensor]:
    """Call the operator with checked arguments."""
    return torch.ops.moe_routing.permute(hidden, *parts(plan), layout, quantize, backend)  # type: ignore[no-any-return] # as its schema says


def combine(
    rows: Tensor, plan: DispatchPlan, weights: Tensor | None, backend: str | None
) -> Tensor:
    """Call the operator with checked arguments."""
    return torch.ops.moe_routing.combine(rows, *parts(plan), weights, backend)  # type: ignore[no-any-return] # likewise


def _permute(
    hidden: Tensor,
    *rest: Any,  # noqa: ANN401 -- the operator's schema
) -> tuple[Tensor, Tensor]:
    from moe_routing.permutation.call import run_permute

    *parts, layout, quantize, backend = rest
    return run_permute(hidden, DispatchPlan(*parts), layout, quantize, backend)


def _combine(rows: Tensor, *rest: Any) -> Tensor:  # noqa: ANN401 -- likewise
    from moe_routing.permutation.call import run_combine

    *parts, weights, backend = rest
    return run_combine(rows, DispatchPlan(*parts), weights, backend)


def _combine_backward(grad: Tensor, rows: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401 -- likewise
    from moe_routing.permutation.call import run_combine_backward

    *parts, weights, backend = rest
    return run_combine_backward(grad, rows, DispatchPlan(*parts), weights, backend)


def _permute_fake(hidden: Tensor, order: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401 -- likewise
    from moe_routing.permutation.call import empty_permuted

    return empty_permuted(hidden, order, rest[-2])


def _combine_fake(rows: Tensor, _order: Tensor, inverse: Tensor, *_rest: Any) -> Tensor:  # noqa: ANN401 -- likewise
    return rows.new_empty(inverse.shape[0], rows.shape[1])


def _combine_backward_fake(
    _grad: Tensor,
    rows: Tensor,
    *rest: Any,  # noqa: ANN401 -- likewise
) -> tuple[Tensor, Tensor]:
    weights = rest[-2]
    of_weights = (0,) if weights is None else weights.shape
    return rows.new_empty(rows.shape), rows.new_empty(of_weights, dtype=torch.float32)


def _save_permute(ctx: FunctionCtx, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *parts, _layout, _quantize, backend = inputs[1:]
    ctx.save_for_backward(*parts)
    ctx.backend = backend  # type: ignore[attr-defined] # a bag by design
    ctx.mark_non_differentiable(output[1])


def _permute_backward(ctx: Any, grad_rows: Tensor, _grad_scales: None) -> tuple[Tensor | None, ...]:  # noqa: ANN401 -- a bag by design
    from moe_routing.permutation.problem import FLOATS

    plan = DispatchPlan(*ctx.saved_tensors)
    grad_rows = grad_rows.flatten(0, -2)  # of the matrices of a masked plan
    if str(grad_rows.dtype).removeprefix("torch.") in FLOATS and _combines(ctx.backend):
        grad = combine(grad_rows, plan, None, ctx.backend)
    else:  # float64, which no kernel is asked to add, or a named backend that only permutes
        from moe_routing.formula.permutation import combined

        grad = combined(grad_rows, plan, None)
    return grad, *_NO_GRADIENTS, None, None, None


def _combines(backend: str | None) -> bool:
    """Tell whether the backend that was named, if any, computes ``combine``."""
    from moe_routing._registry import registry

    return backend is None or "combine" in registry().backends[backend].factories


def _save_combine(
    ctx: FunctionCtx,
    inputs: tuple[Any, ...],
    output: Tensor,  # noqa: ARG001 -- torch's protocol
) -> None:
    rows, *parts, weights, backend = inputs
    ctx.save_for_backward(rows, weights, *parts)
    ctx.backend = backend  # type: ignore[attr-defined] # a bag by design


def _gradient_of_combine(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 -- a bag by design
    rows, weights, *parts = ctx.saved_tensors
    grad_rows, grad_weights = torch.ops.moe_routing.combine_backward(
        grad, rows, *parts, weights, ctx.backend
    )
    of_weights = None if weights is None else grad_weights.to(weights.dtype)
    return grad_rows, *_NO_GRADIENTS, of_weights, None


def _save_combine_backward(
    ctx: FunctionCtx,
    inputs: tuple[Any, ...],
    output: tuple[Tensor, Tensor],  # noqa: ARG001 -- torch's protocol
) -> None:
    grad, rows, *parts, weights, backend = inputs
    ctx.save_for_backward(grad, rows, weights, *parts)
    ctx.backend = backend  # type: ignore[attr-defined] # a bag by design


def _second_gradient_of_combine(
    ctx: Any,  # noqa: ANN401 -- a bag by design
    of_rows: Tensor,
    of_weights: Tensor,
) -> tuple[Tensor | None, ...]:
    """Return what gradients the gradients have.

    With g the gradient of the result, ``combine_backward`` returns ``w * g`` and ``<g, y>`` for
    each pair: it is linear in g, and in w and y.
    """
    grad, rows, weights, *parts = ctx.saved_tensors
    plan, backend = DispatchPlan(*parts), ctx.backend
    backward = torch.ops.moe_routing.combine_backward
    of_grad = combine(of_rows, plan, weights, backend)
    if weights is None:
        return of_grad, torch.zeros_like(rows), *_NO_GRADIENTS, None, None
    of_grad = of_grad + combine(rows, plan, of_weights, backend)
    of_y, _ = backward(grad, rows, *parts, of_weights, backend)
    _, of_w = backward(grad, of_rows, *parts, weights, backend)
    return of_grad, of_y, *_NO_GRADIENTS, of_w.to(weights.dtype), None


for _name, _function, _fake in (
    ("permute", _permute, _permute_fake),
    ("combine", _combine, _combine_fake),
    ("combine_backward", _combine_backward, _combine_backward_fake),
):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moe_routing::{_name}", _fake, lib=_LIBRARY)
torch.library.register_autograd(
    "moe_routing::permute", _permute_backward, setup_context=_save_permute, lib=_LIBRARY
)
torch.library.register_autograd(
    "moe_routing::combine", _gradient_of_combine, setup_context=_save_combine, lib=_LIBRARY
)
torch.library.register_autograd(
    "moe_routing::combine_backward",
    _second_gradient_of_combine,
    setup_context=_save_combine_backward,
    lib=_LIBRARY,
)
