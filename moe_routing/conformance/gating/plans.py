"""Clauses 2 and 11: hidden states to a dispatch plan; a kernel that gates may have a part in it."""

from __future__ import annotations

from itertools import cycle, product
from typing import TYPE_CHECKING, Any

from moe_routing.conformance import streams
from moe_routing.conformance.gating import _sets
from moe_routing.conformance.gating._check import check
from moe_routing.conformance.gating.calls import bits_of
from moe_routing.conformance.gating.cases import PLANS, Case
from moe_routing.conformance.planning import cases as planning
from moe_routing.conformance.requirements import require
from moe_routing.conformance.under_test import NotApplicableError
from moe_routing.planning import RoutedPlan

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.gating.calls import Call
    from moe_routing.conformance.under_test import BackendUnderTest
    from moe_routing.gating import GateOutput

TOKENS = (1, 70, 5, 1100)
WITHOUT_PLACE = 3
"""Experts, the last ones, that a plan does not know; with shared experts it knows all."""
CALLS = 3


def _planned(profile: Profile) -> Iterator[Case]:
    sizes = TOKENS[:2] if profile == "smoke" else TOKENS
    for n, (tokens, plan) in enumerate(product(sizes, PLANS)):
        yield Case(**_sets.FORMS[n % len(_sets.FORMS)], num_tokens=tokens, plan=plan)
    for case, plan in zip(_sets.of_every_variant(profile), cycle(PLANS), strict=False):
        yield case.but(plan=plan)
        if case.spec.shared_experts:
            yield case.but(plan="sorted", mapped=False)


@check(2, _planned)
def what_is_gated_is_planned(under_test: BackendUnderTest, case: Case) -> None:
    """With a plan, weights and ids are those without, and the plan is that of the ids."""
    call, asked = _planning(under_test, case), PLANS[case.plan]
    for turn in range(CALLS):
        other = case.but(turn=turn).make(call.device)
        call = call.with_projection(hidden=other.projection.hidden)
        made = call.checked(under_test)
        found = _with_plan(under_test, call, asked)
        _must_plan(found, made, call, asked, f"call {turn + 1}")


@check(11, _planned, capability="cuda_graphs")
def a_graph_of_a_plan_replays_with_new_inputs(under_test: BackendUnderTest, case: Case) -> None:
    """A graph of hidden states to a plan replays with other hidden states, again and again."""
    streams.need_cuda(under_test)
    call, asked = _planning(under_test, case), PLANS[case.plan]
    call.made(under_test)  # what is declined, is declined here
    _with_plan(under_test, call, asked)
    graph, made = streams.captured(under_test.device, lambda: _with_plan(under_test, call, asked))
    for turn in range(streams.TURNS):
        other = case.but(turn=turn).make(call.device)
        call.projection.hidden.copy_(other.projection.hidden)
        streams.replay(graph, under_test.device)
        _must_plan(RoutedPlan(*made), call.made(under_test), call, asked, f"replay {turn + 1}")


def _planning(under_test: BackendUnderTest, case: Case) -> Call:
    if "plan" not in under_test.spec.factories:
        msg = "it does not plan"
        raise NotApplicableError(msg)
    return case.make(under_test.device)


def _with_plan(under_test: BackendUnderTest, call: Call, asked: dict[str, Any]) -> RoutedPlan:
    gate: Any = call.gate(under_test)
    made: RoutedPlan = gate.with_plan(**call.arguments, **asked, num_experts=_experts(call))
    return made


def _experts(call: Call) -> int:
    """Return how many experts the plan knows."""
    experts, shared = len(call.projection.router_weight), call.spec.shared_experts
    return experts + shared if shared else max(1, experts - WITHOUT_PLACE)


def _must_plan(
    found: RoutedPlan, made: GateOutput, call: Call, asked: dict[str, Any], what: str
) -> None:
    """Require the weights and ids of a call without a plan, and the one right plan of the ids.

    :param made: what the call without a plan returned.
    """
    require((bits_of(found.weights) == bits_of(made.weights)).all(), f"{what}: other weights")
    require((found.ids == made.ids).all(), f"{what}: other ids")
    weights = found.weights if asked.get("drop") == "least_weight" else None
    planned = planning.Call(ids=found.ids, num_experts=_experts(call), weights=weights, **asked)
    planning.must_match(planned, found.plan, what)
