"""Clause 8: the same call gives the same bits, whatever happens between or at once."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from moe_routing.conformance.planning import _sets, cases
from moe_routing.conformance.planning._check import check
from moe_routing.conformance.planning.cases import Call, Case
from moe_routing.conformance.threads import THREADS, made_at_once

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.under_test import BackendUnderTest

RUNS = 50
CALLS = 12


def _other(call: Call, turn: int) -> Call:
    """Return a call of the same shapes and strides with other ids and weights."""
    changed = {"ids": call.ids.roll((turn, turn), (0, 1)).contiguous()}
    if call.weights is not None:
        changed["weights"] = call.weights.roll(turn, 0).neg().contiguous()
    return call.but(**changed)


def _repeated(profile: Profile) -> Iterator[Case]:
    yield from _sets.in_every_form(profile, num_tokens=129)
    yield Case(num_tokens=2053, topk=4, ids="first_expert")


@check(8, _repeated)
def the_same_call_gives_the_same_bits(under_test: BackendUnderTest, case: Case) -> None:
    """Fifty runs give the same bits, with other calls of the kind between them."""
    call = case.make(under_test.device)
    other = _other(call, 1)
    right = call.expected()
    for run in range(RUNS):
        cases.must_equal(cases.plan(under_test, call), right, f"run {run + 1} of {RUNS}")
        if run % 5 == 0:
            cases.plan(under_test, other)


@check(8, _sets.in_every_form)
def operands_changed_in_place_are_read_again(under_test: BackendUnderTest, case: Case) -> None:
    """Ids, weights and the capacity may change between two calls, and plans before them stay."""
    call = case.make(under_test.device)
    first = cases.plan(under_test, call)
    right = call.expected()
    cases.must_equal(first, right, "the first call")
    for turn in (1, 2, 3):
        other = _other(call, turn)
        call.ids.copy_(other.ids)
        cases.checked(under_test, call, "ids changed in place")
        if call.weights is not None and other.weights is not None:
            call.weights.copy_(other.weights)
            cases.checked(under_test, call, "weights changed in place")
        if call.capacity is not None:
            cases.checked(under_test, call.but(capacity=turn), "another capacity")
    cases.must_equal(first, right, "a plan of an earlier call")


def _threaded(profile: Profile) -> Iterator[Case]:
    return _sets.in_every_form(profile, num_tokens=257)


@check(8, _threaded)
def eight_threads_may_share_a_kernel(under_test: BackendUnderTest, case: Case) -> None:
    """Eight threads that plan at once, with ids of their own, get what each would get alone."""
    call = case.make(under_test.device)
    cases.plan(under_test, call)  # whatever is built, is built now
    calls = [_other(call, thread // 2) for thread in range(THREADS)]  # two have the same ids
    work = [partial(cases.plan, under_test, one) for one in calls]
    for one, (what, plans) in zip(calls, made_at_once(work, CALLS), strict=True):
        for made in plans:
            cases.must_equal(made, one.expected(), what)
