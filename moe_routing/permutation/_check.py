"""Every argument of ``permute`` and ``combine``, checked before anything is launched."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from moe_routing import _check
from moe_routing.permutation.problem import ANY_FLOAT, FLOATS
from moe_routing.planning.kernel import DispatchPlan
from moe_routing.planning.problem import MAX_TOPK
from moe_routing_registry.text import refusal

if TYPE_CHECKING:
    import torch

    from moe_routing.planning.problem import Layout

_MATRIX = 2
_MASKED = 3
QUANTIZED = "float8_e4m3fn"
_RANKS = {"order": (1, 2), "inverse": (2,), "counts": (1,), "offsets": (1,), "block_experts": (1,)}


def check_quantize(quantize: object, hidden: Tensor) -> None:
    """Require a dtype that rows can be quantized to, and rows of a dtype that can be.

    :raises TypeError: the rows are of another dtype.
    :raises ValueError: there is no such way to quantize.
    """
    if quantize is None:
        return
    if quantize != QUANTIZED:
        raise ValueError(refusal("quantize", f"{QUANTIZED!r} or None", quantize))
    if _name(hidden.dtype) not in FLOATS:
        raise TypeError(refusal("hidden", f"dtype {ANY_FLOAT}, to be quantized", hidden))


def check_plan(plan: object, device: torch.device) -> tuple[DispatchPlan, Layout]:
    """Require a plan whose parts fit each other and lie on the device.

    :raises TypeError: it is no plan, or a part has the wrong type or dtype.
    :raises ValueError: a part has the wrong shape or device, or is not contiguous.
    """
    if not isinstance(plan, DispatchPlan):
        raise TypeError(refusal("plan", "a DispatchPlan", plan))
    for name, ranks in _RANKS.items():
        part = getattr(plan, name)
        if part is None and name == "block_experts":
            continue
        if not isinstance(part, Tensor) or _name(part.dtype) != "int32":
            raise TypeError(refusal("plan", f"an int32 tensor as {name}", part))
        if not _check.is_dense(part) or part.dim() not in ranks or not part.is_contiguous():
            expected = f"a contiguous {name} of rank {' or '.join(map(str, ranks))}"
            raise ValueError(refusal("plan", expected, part))
        if part.device != device:
            raise ValueError(refusal("plan", f"{name} on {device}, as the rows are", part))
    return plan, _layout(plan)


def _layout(plan: DispatchPlan) -> Layout:
    """Return the layout, of which the parts have the right shapes."""
    tokens, topk = plan.inverse.shape
    experts = plan.counts.shape[0]
    if not 1 <= topk <= MAX_TOPK:
        raise ValueError(refusal("plan", f"an inverse of 1 to {MAX_TOPK} columns", plan.inverse))
    if experts < 1:
        raise ValueError(refusal("plan", "counts of one expert or more", plan.counts))
    if plan.offsets.shape[0] != experts + 1:
        expected = f"offsets of shape [{experts + 1}], for counts of {experts} experts"
        raise ValueError(refusal("plan", expected, plan.offsets))
    if plan.order.dim() == _MATRIX:
        if plan.order.shape[0] != experts or plan.block_experts is not None:
            expected = f"an order of shape [{experts}, capacity], and no block_experts"
            raise ValueError(refusal("plan", expected, plan.order))
        return "masked"
    places, pairs = plan.order.shape[0], tokens * topk
    if plan.block_experts is None:
        if places != pairs:
            expected = f"an order of shape [{pairs}], for an inverse of {pairs} pairs"
            raise ValueError(refusal("plan", expected, plan.order))
        return "sorted"
    if places < pairs:
        expected = f"an order of {pairs} places or more, for an inverse of {pairs} pairs"
        raise ValueError(refusal("plan", expected, plan.order))
    return "blocks"


def check_tokens(name: str, rows: Tensor, plan: DispatchPlan) -> None:
    """Require a row for each token of the plan.

    :raises ValueError: there are more or fewer.
    """
    tokens = plan.inverse.shape[0]
    if rows.shape[0] != tokens:
        raise ValueError(refusal(name, f"{tokens} rows, as the plan has tokens", rows))


def check_rows_of_places(rows: object) -> Tensor:
    """Require rows that can be combined.

    :raises TypeError: they are no tensor, or of another dtype.
    :raises ValueError: they have another rank.
    """
    if not isinstance(rows, Tensor):
        raise TypeError(refusal("rows", "a tensor [P, H]", rows))
    if _name(rows.dtype) not in FLOATS:
        raise TypeError(refusal("rows", f"dtype {ANY_FLOAT}", rows))
    if not _check.is_dense(rows) or rows.dim() not in (_MATRIX, _MASKED):
        raise ValueError(refusal("rows", "a dense tensor [P, H], or [E, capacity, H]", rows))
    return rows


def check_places(rows: Tensor, plan: DispatchPlan) -> None:
    """Require a row for each place of the plan: ``[P, H]``, or a matrix of rows if it is one.

    :raises ValueError: there are more or fewer.
    """
    places = list(plan.order.shape)
    if list(rows.shape[:-1]) not in (places, [plan.order.numel()]):
        raise ValueError(refusal("rows", f"shape {[*places, 'H']}", rows))


def check_weights(weights: object, rows: Tensor, plan: DispatchPlan) -> Tensor | None:
    """Require a weight for each pair, or none at all.

    :raises TypeError: they are no tensor, or of another dtype.
    :raises ValueError: they have another shape or device.
    """
    if weights is None:
        return None
    shape = list(plan.inverse.shape)
    if not isinstance(weights, Tensor) or _name(weights.dtype) not in FLOATS:
        raise TypeError(refusal("weights", f"a tensor {shape} of {ANY_FLOAT}", weights))
    if not _check.is_dense(weights) or list(weights.shape) != shape:
        raise ValueError(refusal("weights", f"a dense tensor of shape {shape}", weights))
    if weights.device != rows.device:
        raise ValueError(refusal("weights", f"device {rows.device}, as the rows have", weights))
    return weights


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
