"""Clause 6: the same bits in every run and thread."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from moe_routing.conformance.balancing._check import check
from moe_routing.conformance.balancing.cases import KINDS, Case
from moe_routing.conformance.permutation import outcomes
from moe_routing.conformance.requirements import require
from moe_routing.conformance.threads import THREADS, made_at_once

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.under_test import BackendUnderTest

RUNS = 20
CALLS = 6


def _same(made: tuple[Tensor, ...], first: tuple[Tensor, ...], what: str) -> None:
    for name, some, other in zip(("sums", "counts"), made, first, strict=True):
        require(outcomes.same_bits(some, other), f"{what}: {name}: other bits")


def _kinds(_profile: Profile) -> Iterator[Case]:
    for kind in KINDS:
        yield Case(kind=kind, tokens=300, mask="some", dtype="float32")


@check(6, _kinds)
def the_same_call_gives_the_same_bits(under_test: BackendUnderTest, case: Case) -> None:
    """Twenty runs give the same bits, with other calls of the kind between them."""
    call, other = case.make(under_test.device), case.but(turn=1).make(under_test.device)
    first = call.checked(under_test, "the first run")
    for run in range(2, RUNS + 1):
        _same(call.made(under_test), first, f"run {run} of {RUNS}")
        if run % 5 == 0:
            other.made(under_test)


@check(6, _kinds)
def operands_changed_in_place_are_read_again(under_test: BackendUnderTest, case: Case) -> None:
    """Logits, ids and weights may change between two calls, and results before them stay."""
    call = case.make(under_test.device)
    untouched = case.make(under_test.device)
    first = call.checked(under_test, "the first call")
    for turn in (1, 2):
        call.copy_(case.but(turn=turn).make(under_test.device))
        call.checked(under_test, "operands changed in place")
    untouched.must_match(first, "the result of an earlier call")


@check(6, _kinds)
def eight_threads_may_share_a_kernel(under_test: BackendUnderTest, case: Case) -> None:
    """Eight threads that call at once, with logits of their own, get what each would get alone."""
    # Two threads have the same call.
    calls = [case.but(turn=thread // 2).make(under_test.device) for thread in range(THREADS)]
    calls[0].made(under_test)  # whatever is built, is built now
    work = [partial(call.made, under_test) for call in calls]
    for call, (what, made) in zip(calls, made_at_once(work, CALLS), strict=True):
        call.must_match(made[0], what)
        for again in made[1:]:
            _same(again, made[0], what)
