"""``permute`` and ``combine``: check the arguments, find the kernel, and call it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from moe_routing._call_cache import is_plain
from moe_routing._check import matrix
from moe_routing._dispatch import chosen, dtype_name
from moe_routing._registry import registry
from moe_routing.formula.permutation import combined_backward
from moe_routing.permutation import _check, op
from moe_routing.permutation.kernel import CombinesBackward, PermutedRows
from moe_routing.permutation.problem import GROUP, CombineProblem, PermuteProblem
from moe_routing.probing import probe
from moe_routing_registry import Request
from moe_routing_registry.request import preference
from moe_routing_registry.text import refusal

if TYPE_CHECKING:
    from moe_routing.permutation.kernel import CombineKernel, PermuteKernel
    from moe_routing.planning.kernel import DispatchPlan
    from moe_routing.planning.problem import Layout
    from moe_routing_registry import Problem

_registry = registry()
_kernels: dict[tuple[object, ...], Any] = {}
_KERNELS_KEPT = 1024
"""When there are more, remembering begins anew."""


@overload
def permute(
    hidden: Tensor, plan: DispatchPlan, *, quantize: None = None, backend: str | None = None
) -> Tensor: ...
@overload
def permute(
    hidden: Tensor, plan: DispatchPlan, *, scales: Tensor, backend: str | None = None
) -> PermutedRows: ...
@overload
def permute(
    hidden: Tensor,
    plan: DispatchPlan,
    *,
    quantize: Literal["float8_e4m3fn"],
    backend: str | None = None,
) -> PermutedRows: ...
def permute(
    hidden: Tensor,
    plan: DispatchPlan,
    *,
    scales: Tensor | None = None,
    quantize: Literal["float8_e4m3fn"] | None = None,
    backend: str | None = None,
) -> Tensor | PermutedRows:
    """Copy the rows of tokens into the order of a plan: by expert, then by token, then by slot.

    Rows are copied bit for bit. Places without a pair of an expert get zeros: a sorted plan's from
    ``offsets[E]`` on, and the empty ones of blocks. In a masked plan they may hold anything, since
    ``counts`` says how much of each expert's matrix is used. Nothing is read on the host.

    :param hidden: ``[T, H]``, of any dtype and strides.
    :param plan: of T tokens, on the same device.
    :param scales: ``[T, S]``: what belongs to each row, such as the scales of fp8 rows; it is
        copied likewise.
    :param quantize: round bfloat16, float16 or float32 rows to this dtype. 128 neighbouring values
        share a float32 scale, their largest magnitude divided by 448; a value is about what it was
        rounded to, times its scale.
    :param backend: use this one or raise. Without it the registry chooses, as for a router.
    :returns: ``[P, H]``, with P the places of the plan; of a masked plan ``[E, capacity, H]``. With
        ``scales`` or ``quantize`` a ``PermutedRows``, whose scales have the same leading shape. The
        gradient of ``hidden`` is the sum over a token's slots, in float32 and from slot 0 on.
    :raises TypeError: an argument has the wrong type or dtype.
    :raises ValueError: an argument has the wrong value, shape or device.
    :raises BackendUnavailableError: no backend fits, or the one that was named does not.

    >>> import moe_routing
    >>> plan = moe_routing.plan(torch.tensor([[1, 0], [1, 2]]), 3)
    >>> permute(torch.tensor([[1.0], [2.0]]), plan).flatten().tolist()
    [1.0, 1.0, 2.0, 2.0]
    """
    hidden = matrix("hidden", hidden, "[T, H]")
    plan, layout = _check.check_plan(plan, hidden.device)
    _check.check_tokens("hidden", hidden, plan)
    _check.check_quantize(quantize, hidden)
    _check_backend(backend)
    if scales is not None:
        if quantize is not None:
            raise ValueError(refusal("scales", "None, for rows that are quantized", scales))
        scales = matrix("scales", scales, "[T, H]")
        if scales.device != hidden.device:
            raise ValueError(refusal("scales", f"device {hidden.device}, as hidden has", scales))
        _check.check_tokens("scales", scales, plan)
        return PermutedRows(
            _permute(hidden, plan, layout, "", backend)[0],
            _permute(scales, plan, layout, "", backend)[0],
        )
    differentiable = hidden.requires_grad and torch.is_grad_enabled()
    if quantize is None:
        return _permute(hidden, plan, layout, "", backend)[0]
    if differentiable:
        raise ValueError(refusal("quantize", "None, for rows that require gradients", quantize))
    return PermutedRows(*_permute(hidden, plan, layout, quantize, backend))


def combine(
    rows: Tensor, plan: DispatchPlan, weights: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """Sum the rows of each token's slots, which lie in the order of a plan, with weights.

    Row t is the sum over the slots k of ``weights[t, k] * rows[plan.inverse[t, k]]``: in float32,
    from slot 0 to slot K - 1, and rounded once, so it has the same bits for any number of tokens. A
    pair without a place adds nothing, and rows at places without a pair are not read: a grouped
    product need not have written them. Nothing is read on the host.

    :param rows: bfloat16, float16 or float32 ``[P, H]``, with P the places of the plan; of a masked
        plan ``[E, capacity, H]``; of any strides.
    :param weights: bfloat16, float16 or float32 ``[T, K]``; ``None`` is 1 for every pair.
    :param backend: use this one or raise. Without it the registry chooses, as for a router.
    :returns: ``[T, H]``, of the rows' dtype, with gradients to rows and weights.
    :raises TypeError: an argument has the wrong type or dtype.
    :raises ValueError: an argument has the wrong value, shape or device.
    :raises BackendUnavailableError: no backend fits, or the one that was named does not.

    >>> import moe_routing
    >>> plan = moe_routing.plan(torch.tensor([[1, 0], [1, 2]]), 3)
    >>> rows = torch.tensor([[1.0], [2.0], [3.0], [4.0]])  # of pairs 1, 0, 2 and 3
    >>> combine(rows, plan, torch.tensor([[0.5, 2.0], [1.0, 1.0]])).flatten().tolist()
    [3.0, 7.0]
    """
    rows = _check.check_rows_of_places(rows)
    plan, _ = _check.check_plan(plan, rows.device)
    _check.check_places(rows, plan)
    weights = _check.check_weights(weights, rows, plan)
    _check_backend(backend)
    if rows.dim() > 2:  # noqa: PLR2004 -- the matrices of a masked plan
        rows = rows.flatten(0, 1)
    if is_plain(rows, weights, *op.parts(plan)):
        return run_combine(rows, plan, weights, backend)
    return op.combine(rows, plan, weights, backend)


def _permute(
    hidden: Tensor, plan: DispatchPlan, layout: Layout, quantize: str, backend: str | None
) -> tuple[Tensor, Tensor]:
    if is_plain(hidden, *op.parts(plan)):
        return run_permute(hidden, plan, layout, quantize, backend)
    return op.permute(hidden, plan, layout, quantize, backend)


def _check_backend(backend: object) -> None:
    if backend is None:
        return
    if not isinstance(backend, str):
        raise TypeError(refusal("backend", "a name, or None", backend))
    if is_dynamo_compiling():
        from moe_routing._traced import check_backend

        check_backend(backend)
    else:
        _registry.check_names(Request(backend=backend, asked_by="argument"))


class _Asked(NamedTuple):
    """What a choice of a kernel depends on, and names it among those that are remembered."""

    operation: str
    topk: int
    dtype: torch.dtype
    detail: object
    device: torch.device
    backend: str | None
    preferred: str | None
    generation: int


def _kernel(problem: Problem, device: torch.device, backend: str | None, asked: _Asked) -> Any:  # noqa: ANN401 -- each operation has its own type
    kernel, _ = chosen(problem, probe(device), Request.gather(backend))
    if len(_kernels) >= _KERNELS_KEPT:
        _kernels.clear()
    _kernels[asked] = kernel
    return kernel


def run_permute(
    hidden: Tensor, plan: DispatchPlan, layout: Layout, quantize: str, backend: str | None
) -> tuple[Tensor, Tensor]:
    """Permute checked real tensors; the scales are empty without ``quantize``."""
    hidden = _readable(hidden)
    columns = hidden.shape[1]
    out, scales = empty_permuted(hidden, plan.order, quantize)
    if not hidden.numel() or not plan.order.numel():
        return out.zero_(), scales.zero_()
    topk = plan.inverse.shape[1]
    asked = _Asked(
        "permute", topk, hidden.dtype, (layout, quantize), hidden.device, backend,
        preference.get(), _registry.generation,
    )  # fmt: skip
    kernel: PermuteKernel | None = _kernels.get(asked)
    if kernel is None:
        problem = PermuteProblem(
            topk=topk,
            dtype=dtype_name(hidden.dtype),
            layout=layout,
            quantize=quantize,  # type: ignore[arg-type] # it has been checked
        )
        kernel = _kernel(problem, hidden.device, backend, asked)
    assert kernel is not None  # noqa: S101 -- for mypy
    if quantize:
        kernel(hidden, plan, out.view(-1, columns), scales=scales.view(-1, scales.shape[-1]))
    else:
        kernel(hidden, plan, out.view(-1, columns))
    return out, scales


def run_combine(
    rows: Tensor, plan: DispatchPlan, weights: Tensor | None, backend: str | None
) -> Tensor:
    """Combine checked real tensors, rows ``[P, H]``."""
    rows = _readable(rows)
    out = rows.new_empty(plan.inverse.shape[0], rows.shape[1])
    if not out.numel() or not rows.numel():
        return out.zero_()
    kernel = _combine_kernel(rows, plan, weights, backend)
    kernel(rows, plan, None if weights is None else _packed(weights), out)
    return out


def run_combine_backward(
    grad: Tensor, rows: Tensor, plan: DispatchPlan, weights: Tensor | None, backend: str | None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of rows and weights, the latter in float32, empty without weights."""
    grad, rows = _readable(grad), _readable(rows)
    grad_rows = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    if weights is None:
        grad_weights = rows.new_empty(0, dtype=torch.float32)
    else:
        weights = _packed(weights)
        grad_weights = torch.empty(weights.shape, dtype=torch.float32, device=rows.device)
    if not grad.numel() or not rows.numel():
        return grad_rows.zero_(), grad_weights.zero_()
    kernel = _combine_kernel(rows, plan, weights, backend)
    if not isinstance(kernel, CombinesBackward):
        of_rows, of_weights = combined_backward(grad, rows, plan, weights)
        return of_rows, grad_weights if of_weights is None else of_weights
    kernel.backward(grad, rows, plan, weights, grad_rows, None if weights is None else grad_weights)
    return grad_rows, grad_weights


def _combine_kernel(
    rows: Tensor, plan: DispatchPlan, weights: Tensor | None, backend: str | None
) -> CombineKernel:
    topk = plan.inverse.shape[1]
    weights_dtype = None if weights is None else weights.dtype
    asked = _Asked(
        "combine", topk, rows.dtype, weights_dtype, rows.device, backend, preference.get(),
        _registry.generation,
    )  # fmt: skip
    kernel: CombineKernel | None = _kernels.get(asked)
    if kernel is None:
        problem = CombineProblem(
            topk=topk,
            dtype=dtype_name(rows.dtype),
            weights="" if weights_dtype is None else dtype_name(weights_dtype),
        )
        kernel = _kernel(problem, rows.device, backend, asked)
    assert kernel is not None  # noqa: S101 -- for mypy
    return kernel


def empty_permuted(hidden: Tensor, order: Tensor, quantize: str) -> tuple[Tensor, Tensor]:
    """Return memory for permuted rows and their scales, which are empty without ``quantize``."""
    columns = hidden.shape[1]
    dtype = torch.float8_e4m3fn if quantize else hidden.dtype
    out = hidden.new_empty((*order.shape, columns), dtype=dtype)
    groups = (*order.shape, -(-columns // GROUP)) if quantize else (0,)
    return out, hidden.new_empty(groups, dtype=torch.float32)


def _readable(rows: Tensor) -> Tensor:
    """Return rows as memory that a kernel may read: not negated lazily, and of unit stride."""
    rows = rows.resolve_conj().resolve_neg()
    # A single column counts as contiguous whatever its stride is, but cannot be viewed as integers.
    return rows if rows.stride(1) == 1 else rows.clone(memory_format=torch.contiguous_format)


def _packed(weights: Tensor) -> Tensor:
    return weights.resolve_neg().contiguous()
