"""The plan of ids that a router is about to return: what ``Router.with_plan`` adds to a call.

All is checked, and the backend of the plan chosen, before the router writes anything. A plan that
has been made once for a kind of routing call serves all later calls of that kind: the router has
recognised their tensors, so only the plan that is given as ``out`` is looked at here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from torch import Tensor

from moe_routing._call_cache import UNREADABLE
from moe_routing._check import is_dtensor
from moe_routing._registry import registry
from moe_routing.kernel import RoutingOutput, fields
from moe_routing.planning import _check
from moe_routing.planning.call import Call, choice, plan, prepared, served, shapes
from moe_routing.planning.kernel import DispatchPlan, RoutedPlan
from moe_routing.planning.latest import form_of, parts_of
from moe_routing.planning.problem import MAX_EXPERTS, MAX_TOPK, MOST
from moe_routing.private_api import tensor_guard
from moe_routing_registry.text import refusal

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from moe_routing.kernel import Operands
    from moe_routing.planning.problem import PlanProblem

Asked = tuple["int | None", "int | None", "int | None", Literal["last", "least_weight"], bool]
"""``num_experts``, ``block``, ``capacity``, ``drop`` and ``masked``, as the caller wrote them."""

PLANS_KEPT = 64
"""Kinds of plans of one kind of routing call; when there are more, remembering begins anew."""
_ADDRESSES_KEPT = 4096
"""Sets of addresses that are remembered; when there are more, remembering begins anew."""
_registry = registry()
_tuple = tuple.__new__
"""Makes a named tuple in half the time of its own constructor, which is a Python function."""


class Planned(NamedTuple):
    """What serves the plans of one kind of routing call.

    :ivar parts_alike: tells whether the parts of a plan to fill are like those that passed the
        checks; ``None`` for calls without ``out``.
    :ivar form: which parts such a plan has.
    :ivar apart: addresses of tensors that were seen to share no memory.
    """

    call: Call
    parts_alike: Callable[..., bool] | None = None
    form: tuple[bool, bool] | None = None
    apart: set[tuple[int, ...]] = set()  # noqa: RUF012 -- never filled where there is no `out`

    def fill(self, weights: Tensor, ids: Tensor, out: DispatchPlan | None) -> DispatchPlan:
        """Plan the ids that the router returned with these weights."""
        looked_at = weights.detach() if self.call.problem.drop == "least_weight" else None
        return served(self.call, ids, out, looked_at)


def known(
    plans: dict[tuple[object, ...], Planned],
    asked: Asked,
    operands: Operands,
    out: DispatchPlan | None,
) -> Planned | None:
    """Return what serves such a plan of a kind of routing call, ``None`` if there was none.

    :param plans: those of the kind of routing call that brings these operands.
    """
    try:
        planned = plans.get(key_of(asked))
        if planned is None or out is None:
            return planned
        parts = parts_of(out)
        if (
            planned.parts_alike is None
            or type(out) is not DispatchPlan
            or form_of(out) != planned.form
            or True in [part.is_nested for part in parts]  # which the guard must not see
            or not planned.parts_alike(*parts)
        ):
            return None
        addresses = _addresses(operands, parts)
        if addresses not in planned.apart:
            _check.check_addresses(out, _named(operands))
            if len(planned.apart) >= _ADDRESSES_KEPT:
                planned.apart.clear()
            planned.apart.add(addresses)
    except UNREADABLE:  # the checks name the argument
        return None
    return planned


def key_of(asked: Asked) -> tuple[object, ...]:
    """Tell the plans of one kind of routing call apart; 128.0 and True are no ints."""
    num_experts, block, capacity, _, masked = asked
    return asked, type(num_experts), type(block), type(capacity), type(masked), _registry.generation


def parts_of_out(out: object) -> tuple[RoutingOutput | None, DispatchPlan | None]:
    """Return the outputs of the router, and the plan to fill.

    :raises TypeError: ``out`` is no ``RoutedPlan``, nor a tuple of its parts.
    """
    if out is None:
        return None, None
    if not isinstance(out, tuple) or len(out) != len(RoutedPlan._fields):
        raise TypeError(refusal("out", "a RoutedPlan (weights, ids, plan)", out))
    weights, ids, planned = out
    for name, part, kind in (
        ("weights", weights, Tensor),
        ("ids", ids, Tensor),
        ("plan", planned, DispatchPlan),
    ):
        if not isinstance(part, kind):
            expected = f"a RoutedPlan (weights, ids, plan) with a {kind.__name__} for {name}"
            raise TypeError(refusal("out", expected, part))
    return _tuple(RoutingOutput, (weights, ids)), planned


def checked(  # noqa: PLR0913, PLR0917 -- what the router knows of its ids, and what is asked
    operands: Operands,
    topk: int,
    shared: int,
    ids_dtype: torch.dtype,
    asked: Asked,
    out: DispatchPlan | None,
) -> tuple[PlanProblem, int | None]:
    """Return the problem that the arguments ask for, and the capacity as an int.

    :param operands: have passed the router's checks, like ``topk`` and ``ids_dtype``.
    :param shared: how many experts stand in each row after the K selected ones.
    :raises TypeError: an argument has the wrong type or dtype.
    :raises ValueError: an argument has the wrong value, shape or device.
    """
    for name, operand in fields(operands).items():
        if is_dtensor(operand):
            expected = f"a tensor of this process, {name}.to_local() perhaps"
            raise TypeError(refusal(name, expected, operand))
    num_experts, block, capacity, drop, masked = asked
    num_tokens, columns = operands.logits.shape
    if num_experts is None:
        require_experts(num_experts, operands.expert_map)
        num_experts = columns + shared
        if num_experts > MAX_EXPERTS:
            expected = f"E + shared_experts up to {MAX_EXPERTS}, for a plan without num_experts"
            raise ValueError(refusal("logits", expected, num_experts))
    slots = topk + shared
    if slots > MAX_TOPK:
        expected = f"topk + shared_experts up to {MAX_TOPK}, for a plan"
        raise ValueError(refusal("topk", expected, slots))
    if num_tokens * slots > MOST:
        expected = f"T * (topk + shared_experts) up to {MOST}, for a plan"
        raise ValueError(refusal("logits", expected, num_tokens * slots))
    problem, most = _check.problem_of(
        num_tokens, slots, ids_dtype, num_experts,
        block=block, capacity=capacity, drop=drop, masked=masked,
    )  # fmt: skip
    if out is not None:
        _check.check_out(out, shapes(problem, num_tokens, most), operands.logits.device)
    return problem, most


def require_experts(num_experts: int | None, renaming: object) -> None:
    """Require the number of physical experts where ids are renamed; the host cannot see it.

    :param renaming: the ``expert_map`` or replicas of the call, if it has one.
    """
    if num_experts is None and renaming is not None:
        expected = "an int, how many physical experts there are, where ids are renamed"
        raise TypeError(refusal("num_experts", expected, None))


def check_memory(operands: Operands, out: DispatchPlan) -> None:
    """Require that the plan to fill can be written, and shares no memory with another tensor.

    :raises ValueError: it cannot, or it does.
    """
    _check.check_writable(out, (operands.logits,))
    _check.check_addresses(out, _named(operands))


def planner(
    problem: PlanProblem, capacity: int | None, logits: Tensor, backend: str | None
) -> Planned:
    """Choose what plans, before anything is routed.

    :raises BackendUnavailableError: no backend fits, or the one that was named does not.
    """
    call = choice(problem, logits.device, logits.shape[0], capacity, backend)
    return Planned(call)


def composed(
    output: RoutingOutput,
    problem: PlanProblem,
    asked: Asked,
    backend: str | None,
    out: DispatchPlan | None,
) -> RoutedPlan:
    """Plan ids that are no plain memory, or are being traced: ``plan`` knows what to do."""
    _, block, capacity, drop, masked = asked
    weights, ids = output
    made = plan(
        ids,
        problem.num_experts,
        block=block,
        capacity=capacity,
        drop=drop,
        weights=weights.detach() if drop == "least_weight" else None,
        masked=masked,
        backend=backend,
        out=out,
    )
    return RoutedPlan(weights, ids, made)


def remember(
    plans: dict[tuple[object, ...], Planned],
    asked: Asked,
    planned: Planned,
    operands: Operands,
    made: RoutedPlan,
) -> None:
    """Keep what has planned, for later calls of the same kind.

    :param plans: those of that kind of routing call.
    :param made: what the call returned: its ``out``, if it has one.
    """
    call = prepared(planned.call, made.ids, made.plan)
    kept = Planned(call)
    if operands.out is not None:
        parts = parts_of(made.plan)
        apart = {_addresses(operands, parts)}
        kept = Planned(call, tensor_guard(parts), form_of(made.plan), apart)
    if len(plans) >= PLANS_KEPT:
        plans.clear()
    plans[key_of(asked)] = kept


def note(winner: str) -> str:
    """Say how ``Router.with_plan`` plans: no backend does it in the kernel that routes."""
    return f"with_plan: composed of two operations, plan by {winner!r}"


def _addresses(operands: Operands, parts: list[Tensor]) -> tuple[int, ...]:
    *given, out = operands
    everything = (*given, *(out or ()), *parts)
    return tuple([t.data_ptr() for t in everything if t is not None and type(t) is not int])


def _named(operands: Operands) -> dict[str, object]:
    """Return all that a routing call reads and writes, by name."""
    given = operands._asdict()
    out = given.pop("out")
    return given | ({} if out is None else out._asdict())
