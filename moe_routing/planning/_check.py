"""Every argument of ``plan``, checked before anything is launched."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_routing import _check
from moe_routing._overlap import address, span
from moe_routing.formula.plan import places
from moe_routing.planning.kernel import DispatchPlan
from moe_routing.planning.problem import MAX_EXPERTS, MAX_TOPK, MOST, PlanProblem
from moe_routing.private_api import is_functorch_wrapped_tensor, is_zero_tensor
from moe_routing_registry.text import refusal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moe_routing.planning.problem import Drop, Layout

_MATRIX = 2
_POLICIES = ("last", "least_weight")


def checked(  # noqa: PLR0913 -- the arguments of `plan`
    ids: object,
    num_experts: object,
    *,
    block: object,
    capacity: object,
    drop: object,
    weights: object,
    masked: object,
) -> tuple[PlanProblem, int | None]:
    """Return the problem that the arguments ask for, and the capacity as an int.

    :raises TypeError: an argument has the wrong type or dtype.
    :raises ValueError: an argument has the wrong value, shape or device, or places exceed int32.
    """
    if not isinstance(ids, Tensor):
        raise TypeError(refusal("ids", "an int32 or int64 tensor [T, K]", ids))
    if ids.dtype not in _check.IDS_DTYPES:
        raise TypeError(refusal("ids", "dtype int32 or int64", ids))
    if not _check.is_dense(ids) or ids.dim() != _MATRIX:
        raise ValueError(refusal("ids", "a dense tensor [T, K] of rank 2", ids))
    if _check.is_dtensor(ids):
        raise TypeError(refusal("ids", "a tensor of this process, ids.to_local() perhaps", ids))
    num_tokens, topk = ids.shape
    if not 1 <= topk <= MAX_TOPK:
        raise ValueError(refusal("ids", f"1 to {MAX_TOPK} columns", ids))
    if num_tokens * topk > MOST:
        raise ValueError(refusal("ids", f"T * K up to {MOST}", num_tokens * topk))
    made = problem_of(
        num_tokens, topk, ids.dtype, num_experts,
        block=block, capacity=capacity, drop=drop, masked=masked,
    )  # fmt: skip
    _check_weights(weights, ids, wanted=drop == "least_weight")
    return made


def problem_of(  # noqa: PLR0913 -- the arguments of `plan`
    num_tokens: int,
    topk: int,
    ids_dtype: torch.dtype,
    num_experts: object,
    *,
    block: object,
    capacity: object,
    drop: object,
    masked: object,
) -> tuple[PlanProblem, int | None]:
    """Return the problem of planning ids that have been checked, or are still to be made.

    :raises TypeError: an argument has the wrong type.
    :raises ValueError: an argument has the wrong value, or places exceed int32.
    """
    experts = _within("num_experts", num_experts, MAX_EXPERTS)
    if not isinstance(masked, bool):
        raise TypeError(refusal("masked", "True or False", masked))
    if drop not in _POLICIES:
        raise ValueError(refusal("drop", "'last' or 'least_weight'", drop))
    most = None if capacity is None else _within("capacity", capacity, MOST)
    if masked and most is None:
        raise ValueError(refusal("capacity", "an int, for masked=True", None))
    if masked and block is not None:
        raise ValueError(refusal("block", "None, for masked=True", block))
    if drop == "least_weight" and most is None:
        raise ValueError(refusal("capacity", "an int, for drop='least_weight'", None))
    size = None if block is None else _within("block", block, MOST)
    layout: Layout = "masked" if masked else "sorted" if size is None else "blocks"
    policy: Drop = "nothing" if most is None else drop  # type: ignore[assignment] # one of the two
    _check_places(num_tokens * topk, experts, size, most if masked else None)
    problem = PlanProblem(
        num_experts=experts,
        topk=topk,
        ids_dtype=str(ids_dtype).removeprefix("torch."),
        layout=layout,
        block=size or 1,
        drop=policy,
    )
    return problem, most


def _within(name: str, value: object, most: int) -> int:
    number = _check.integer(name, value)
    if not 1 <= number <= most:
        raise ValueError(refusal(name, f"an int from 1 to {most}", number))
    return number


def _check_weights(weights: object, ids: Tensor, *, wanted: bool) -> None:
    """Require the weights of a policy that looks at them, and none elsewhere."""
    if not wanted:
        if weights is not None:
            raise ValueError(refusal("weights", "None, unless drop='least_weight'", weights))
        return
    if not isinstance(weights, Tensor) or weights.dtype is not torch.float32:
        raise TypeError(refusal("weights", f"a float32 tensor of shape {list(ids.shape)}", weights))
    if not _check.is_dense(weights) or weights.shape != ids.shape:
        raise ValueError(refusal("weights", f"a dense tensor of shape {list(ids.shape)}", weights))
    if weights.device != ids.device:
        raise ValueError(refusal("weights", f"the ids' device {ids.device}", weights))


def _check_places(pairs: int, experts: int, block: int | None, masked: int | None) -> None:
    """Require that every place fits int32; the number of pairs, which stands for none, does."""
    if masked is not None and experts * masked > MOST:
        expected = f"num_experts * capacity up to {MOST}"
        raise ValueError(refusal("capacity", expected, experts * masked))
    if block is not None and pairs + experts * (block - 1) > MOST:
        expected = f"T * K + num_experts * (block - 1) up to {MOST}"
        raise ValueError(refusal("block", expected, pairs + experts * (block - 1)))


def check_out(
    out: object, parts: tuple[tuple[int, ...] | None, ...], device: torch.device
) -> DispatchPlan:
    """Require a plan of tensors that can be filled.

    :param parts: the shape of each, ``None`` for a part that the plan does not have.
    :raises TypeError: a part is missing, too many, or of another dtype.
    :raises ValueError: a part has another shape or device, or cannot be written.
    """
    if not isinstance(out, DispatchPlan):
        raise TypeError(refusal("out", "a DispatchPlan", out))
    for name, part, wanted in zip(DispatchPlan._fields, out, parts, strict=True):
        if (part is None) != (wanted is None):
            expected = "None" if wanted is None else f"a tensor of shape {list(wanted)}"
            raise TypeError(refusal("out", f"{expected} for {name}", part))
        if wanted is None:
            continue
        if not isinstance(part, Tensor) or part.dtype is not torch.int32:
            raise TypeError(refusal("out", f"an int32 {name}", part))
        if (
            not _check.is_dense(part)
            or tuple(part.shape) != wanted
            or part.device != device
            or not part.is_contiguous()
        ):
            expected = f"a contiguous {name} of shape {list(wanted)} on {device}"
            raise ValueError(refusal("out", expected, part))
    return out


def check_writable(out: DispatchPlan, inputs: tuple[Tensor | None, ...]) -> None:
    """Require that ``out`` has memory that may be written here, with what comes of the inputs.

    Not asked where a call is traced: there is no memory to look at.

    :raises ValueError: it has not.
    """
    for name, part in zip(DispatchPlan._fields, out, strict=True):
        if part is not None and (
            is_zero_tensor(part) or (part.is_inference() and not torch.is_inference_mode_enabled())
        ):
            raise ValueError(refusal("out", f"{name} that can be written here", part))
    if any(t is not None and is_functorch_wrapped_tensor(t) for t in inputs) and not all(
        part is None or is_functorch_wrapped_tensor(part) for part in out
    ):
        raise ValueError(refusal("out", "None inside a transform of torch.func", out))


def check_addresses(out: DispatchPlan, others: Mapping[str, object]) -> None:
    """Require that no part of ``out`` shares memory with another or with another tensor.

    :param others: the call's other tensors by name; what is no tensor is left out.
    :raises ValueError: two do.
    """
    parts = [
        (start, start + span(part), name)
        for name, part in zip(DispatchPlan._fields, out, strict=True)
        if part is not None and part.numel() and (start := address(part))
    ]
    read = [
        (start, start + span(part), name)
        for name, part in others.items()
        if isinstance(part, Tensor) and part.numel() and (start := address(part))
    ]
    # Sorted by their first bytes, a range that overlaps any other overlaps a neighbour; the others
    # may overlap each other, so each is looked at alone.
    for alone in ([], *([one] for one in read)):
        ranges = sorted([*parts, *alone])
        for (_, end, name), (start, _, other) in pairwise(ranges):
            if start < end:
                expected = "tensors that share no memory with each other or an input"
                raise ValueError(refusal("out", expected, f"{name} and {other} that overlap"))


def lengths(problem: PlanProblem, num_tokens: int, capacity: int | None) -> tuple[int, int]:
    """Return the number of places, and of blocks (0 in other layouts)."""
    pairs = num_tokens * problem.topk
    if problem.layout == "masked":
        assert capacity is not None  # noqa: S101 -- for mypy: a masked problem has one
        return problem.num_experts * capacity, 0
    if problem.layout == "sorted":
        return pairs, 0
    length = places(pairs, problem.num_experts, problem.block)
    return length, -(-length // problem.block)
