"""``plan``: checks the arguments, finds the kernel, and calls it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from moe_routing._call_cache import UNREADABLE, is_ordinary
from moe_routing._dispatch import chosen
from moe_routing._registry import registry
from moe_routing.planning import _check, latest, op
from moe_routing.planning.kernel import DispatchPlan, PreparesPlans
from moe_routing.private_api import current_device, dispatch_keys, empty, is_fake_mode
from moe_routing.probing import probe
from moe_routing_registry import Request
from moe_routing_registry.request import preference
from moe_routing_registry.text import refusal

if TYPE_CHECKING:
    from collections.abc import Callable

    from moe_routing.planning.kernel import PlanKernel
    from moe_routing.planning.problem import PlanProblem

_CALLS_KEPT = 1024
"""Kinds of calls that are remembered; when there are more, remembering begins anew."""
_tuple = tuple.__new__
"""Makes a named tuple in half the time of its own constructor, which is a Python function."""


class Call(NamedTuple):
    """Calls that passed the checks, and what serves them.

    :ivar kernel: ``None`` where there is no pair. From the second call on it is what the kernel
        prepared for such calls, if it prepares anything.
    :ivar parts: the shape of each part of a plan that such a call allocates, or ``None``.
    :ivar winner: the backend, ``None`` where there is no pair.
    """

    kernel: PlanKernel | None
    problem: PlanProblem
    capacity: int | None
    parts: tuple[tuple[int, ...] | None, ...]
    winner: str | None
    again: bool = False


_calls: dict[tuple[object, ...], Call] = {}
_registry = registry()


def plan(  # noqa: PLR0913 -- one argument each for what a plan can be asked for
    ids: Tensor,
    num_experts: int,
    *,
    block: int | None = None,
    capacity: int | None = None,
    drop: Literal["last", "least_weight"] = "last",
    weights: Tensor | None = None,
    masked: bool = False,
    backend: str | None = None,
    out: DispatchPlan | None = None,
) -> DispatchPlan:
    """Group the pairs of a token and a slot by expert, without a host synchronisation.

    The order is by expert, then by token, then by slot, so the same ids give the same plan on every
    device and for every launch.

    :param ids: ``[T, K]``, int32 or int64, any strides; T may be 0, K is at most 64. An id outside
        ``[0, num_experts)``, -1 of padding for example, has no expert, and its pair no place among
        the experts'. Ids may repeat in a row.
    :param num_experts: E, at most 4,096.
    :param block: let each expert begin at a multiple of it, and leave places empty for that: the
        format of vLLM's and SGLang's ``moe_align_block_size``; 128 is DeepGEMM's contiguous layout.
    :param capacity: the most places of an expert. What is beyond has no place, and counts in
        ``num_dropped``.
    :param drop: which pairs of an expert are beyond its capacity: the ``"last"`` by token and slot,
        or those of the ``"least_weight"``, of equal weights the last.
    :param weights: float32 ``[T, K]``, for ``drop="least_weight"``; NaN counts as -inf.
    :param masked: give each expert a row of a matrix ``[E, capacity]``, DeepGEMM's masked layout.
    :param backend: use this one or raise. Without it the registry chooses, as for a router.
    :param out: a plan to fill, of the shapes that this call returns, whose tensors share memory
        neither with each other nor with an input.
    :returns: a ``DispatchPlan`` of int32 tensors on the ids' device, or ``out``.
    :raises TypeError: an argument has the wrong type or dtype.
    :raises ValueError: an argument has the wrong value, shape or device, or the number of places
        does not fit int32.
    :raises BackendUnavailableError: no backend fits, or the one that was named does not.

    >>> made = plan(torch.tensor([[1, 0], [1, 2]]), 3)
    >>> made.order.tolist(), made.counts.tolist(), made.offsets.tolist()
    ([1, 0, 2, 3], [1, 2, 1], [0, 1, 3, 4])
    >>> made.inverse.tolist()
    [[1, 0], [2, 3]]
    """
    if is_dynamo_compiling():
        return _traced(ids, num_experts, block, capacity, drop, weights, masked, backend, out)
    asked = (num_experts, block, capacity, drop, masked, backend)
    known = latest.call_like(asked, ids, weights, out)
    if known is None:
        return _looked_up(asked, ids, weights, out)
    return served(known, ids, out, weights)


def _looked_up(
    asked: tuple[Any, ...], ids: Tensor, weights: Tensor | None, out: DispatchPlan | None
) -> DispatchPlan:
    """Serve a call unlike the one before: look it up, or check it."""
    key: tuple[object, ...] | None = None
    known = None
    try:
        key = (
            asked, tuple(map(type, asked)), _described(ids), _described(weights),
            None if out is None else (type(out), *map(_described, out)),
            torch.is_inference_mode_enabled() if out is not None else None,
            preference.get(), _registry.generation,
        )  # fmt: skip
        known = _calls.get(key)
    except UNREADABLE:
        key = None
    if known is None or key is None or is_fake_mode():
        num_experts, block, capacity, drop, masked, backend = asked
        return _first(key, ids, num_experts, block, capacity, drop, weights, masked, backend, out)
    if out is not None:
        _check.check_addresses(out, {"ids": ids, "weights": weights})
    made = served(known, ids, out, weights)
    if not known.again:
        known = _calls[key] = prepared(known, ids, made)
    latest.keep(known, asked, ids, weights, out)
    return made


def prepared(call: Call, ids: Tensor, made: DispatchPlan) -> Call:
    """Ask the kernel for what serves further calls like one that it has served."""
    kernel: object = call.kernel
    if call.problem.drop != "least_weight" and isinstance(kernel, PreparesPlans):
        fill = kernel.prepared(ids, made, call.capacity)
        if fill is not None:
            return call._replace(kernel=_as_kernel(fill), again=True)
    return call._replace(again=True)


def _as_kernel(fill: Callable[[Tensor, DispatchPlan], None]) -> PlanKernel:
    def kernel(
        ids: Tensor,
        out: DispatchPlan,
        *,
        capacity: int | None = None,  # noqa: ARG001 -- that of the call it was prepared for
        weights: Tensor | None = None,  # noqa: ARG001 -- no policy that looks at them
    ) -> None:
        fill(ids, out)

    return kernel


def served(
    call: Call, ids: Tensor, out: DispatchPlan | None, weights: Tensor | None
) -> DispatchPlan:
    """Serve ids like those of the call that passed the checks; ``out`` has been checked."""
    return _fill(call, ids, allocated(call.parts, ids.device) if out is None else out, weights)


def _described(tensor: Tensor | None) -> tuple[object, ...] | None:
    if tensor is None:
        return None
    keys = dispatch_keys(tensor).raw_repr()
    return type(tensor), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, keys


def _first(  # noqa: PLR0913, PLR0917 -- the arguments of `plan`
    key: tuple[object, ...] | None,
    ids: Tensor,
    num_experts: int,
    block: int | None,
    capacity: int | None,
    drop: str,
    weights: Tensor | None,
    masked: bool,  # noqa: FBT001 -- likewise
    backend: str | None,
    out: DispatchPlan | None,
) -> DispatchPlan:
    """Check a call, choose what serves it, and remember that for later calls like it."""
    problem, most = _check.checked(
        ids, num_experts, block=block, capacity=capacity, drop=drop, weights=weights, masked=masked
    )
    _check_backend(backend)
    parts = shapes(problem, ids.shape[0], most)
    if out is not None:
        out = _check.check_out(out, parts, ids.device)
        _check.check_writable(out, (ids, weights))
        _check.check_addresses(out, {"ids": ids, "weights": weights})
    if not all(t is None or is_ordinary(t) for t in (ids, weights, *(out or ()))):
        made = op.call(problem, ids, most, weights, backend)
        return made if out is None else _copied(made, out)
    call = choice(problem, ids.device, ids.shape[0], most, backend)
    out = allocated(parts, ids.device) if out is None else out
    _fill(call, ids, out, weights)
    if key is not None:
        _remember(key, call)
    return out


def _remember(key: tuple[object, ...], call: Call) -> None:
    if len(_calls) >= _CALLS_KEPT:
        _calls.clear()
    _calls[key] = call


def choice(
    problem: PlanProblem,
    device: torch.device,
    num_tokens: int,
    capacity: int | None,
    backend: str | None,
) -> Call:
    """Choose what serves checked arguments."""
    kernel = winner = None
    if num_tokens:
        kernel, report = chosen(problem, probe(device), Request.gather(backend))
        winner = report.winner
    return Call(kernel, problem, capacity, shapes(problem, num_tokens, capacity), winner)


def _fill(call: Call, ids: Tensor, out: DispatchPlan, weights: Tensor | None) -> DispatchPlan:
    if call.kernel is None:
        return _without_pairs(call, out)
    call.kernel(ids, out, capacity=call.capacity, weights=weights)
    return out


def planned(  # noqa: PLR0913, PLR0917 -- the operator's arguments
    ids: Tensor,
    weights: Tensor | None,
    num_experts: int,
    block: int | None,
    capacity: int | None,
    drop: str,
    masked: bool,  # noqa: FBT001 -- likewise
    backend: str | None,
) -> DispatchPlan:
    """Plan for the operator, which is given memory, whatever the type of its tensors."""
    key = (
        ids.shape, ids.dtype, ids.device, num_experts, block, capacity, drop, masked, backend,
        preference.get(), _registry.generation,
        None if weights is None else (weights.shape, weights.dtype, weights.device),
    )  # fmt: skip
    call = _calls.get(key)
    if call is None:
        problem, most = _check.checked(
            ids, num_experts, block=block, capacity=capacity, drop=drop, weights=weights,
            masked=masked,
        )  # fmt: skip
        call = choice(problem, ids.device, ids.shape[0], most, backend)
        _remember(key, call)
    return _fill(call, ids, allocated(call.parts, ids.device), weights)


def _check_backend(backend: object) -> None:
    if backend is not None:
        if not isinstance(backend, str):
            raise TypeError(refusal("backend", "a name, or None", backend))
        _registry.check_names(Request(backend=backend, asked_by="argument"))


def shapes(
    problem: PlanProblem, num_tokens: int, capacity: int | None
) -> tuple[tuple[int, ...] | None, ...]:
    """Return the shape of each part of a plan, ``None`` for the parts that it does not have."""
    length, blocks = _check.lengths(problem, num_tokens, capacity)
    experts = problem.num_experts
    return (
        (experts, length // experts) if problem.layout == "masked" else (length,),
        (num_tokens, problem.topk),
        (experts,),
        (experts + 1,),
        (blocks,) if problem.layout == "blocks" else None,
        None if problem.drop == "nothing" else (1,),
    )


def allocated(parts: tuple[tuple[int, ...] | None, ...], device: torch.device) -> DispatchPlan:
    """Return an unwritten plan with parts of these shapes."""
    if device.type == "cuda" and device.index == current_device():
        made = [
            None if shape is None else empty(shape, _strides(shape), torch.int32) for shape in parts
        ]
    else:
        made = [
            None if shape is None else torch.empty(shape, dtype=torch.int32, device=device)
            for shape in parts
        ]
    return _tuple(DispatchPlan, made)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of contiguous rows, or of a vector."""
    return (1,) if len(shape) == 1 else (shape[1], 1)


def _without_pairs(call: Call, out: DispatchPlan) -> DispatchPlan:
    """Fill a plan of no tokens: no kernel is asked for that."""
    for part in (out.order, out.inverse, out.counts, out.offsets, out.num_dropped):
        if part is not None:
            part.zero_()  # no pair is 0, the number of pairs
    if call.problem.layout == "masked":
        assert call.capacity is not None  # noqa: S101 -- for mypy: a masked problem has one
        torch.arange(len(out.offsets), out=out.offsets).mul_(call.capacity)
    return out


def _copied(made: DispatchPlan, out: DispatchPlan) -> DispatchPlan:
    for part, given in zip(made, out, strict=True):
        if part is not None and given is not None:
            given.copy_(part)
    return out


def _traced(  # noqa: PLR0913, PLR0917 -- the arguments of `plan`
    ids: Tensor,
    num_experts: int,
    block: int | None,
    capacity: int | None,
    drop: str,
    weights: Tensor | None,
    masked: bool,  # noqa: FBT001 -- likewise
    backend: str | None,
    out: DispatchPlan | None,
) -> DispatchPlan:
    """Put the operator into the graph that Dynamo is making."""
    problem, most = _check.checked(
        ids, num_experts, block=block, capacity=capacity, drop=drop, weights=weights, masked=masked
    )
    if backend is not None:
        from moe_routing._traced import check_backend

        check_backend(backend)
    if out is not None:
        out = _check.check_out(out, shapes(problem, ids.shape[0], most), ids.device)
    made = op.call(problem, ids, most, weights, backend)
    return made if out is None else _copied(made, out)
