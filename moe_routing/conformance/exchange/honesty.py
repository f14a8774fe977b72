"""Clause 0: the spec is true, so that a transport cannot pass by declining."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import distributed

import moe_routing
from moe_routing.conformance import gaps, honest
from moe_routing.conformance.exchange import _sets, outcomes
from moe_routing.conformance.exchange._check import check
from moe_routing.conformance.honest import Trial
from moe_routing.conformance.permutation.outcomes import must_lie_between
from moe_routing.distributed import ExchangeProblem, Tokens

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.exchange.cases import Case, World
    from moe_routing.conformance.under_test import BackendUnderTest
    from moe_routing.distributed import ExchangeKernel


def _modes(profile: Profile) -> Iterator[Case]:
    yield from _sets.every_mode(profile)
    yield from _sets.unreduced(profile, shared=True)


def _trial(under_test: BackendUnderTest, case: Case) -> Trial:
    world = case.make(under_test.device)

    def called() -> None:
        outcomes.must_be_right(world, outcomes.exchanged(world, world.parallel(under_test)))

    def launched(kernel: ExchangeKernel) -> None:
        group = distributed.group.WORLD
        assert group is not None  # noqa: S101 -- for mypy: the check has one
        exchange = kernel(group)
        received = exchange.dispatch(Tokens(*world.mine))
        plan = moe_routing.plan(received.ids, max(1, len(world.experts)))
        computed = world.computed(moe_routing.permute(received.rows, plan), plan)
        sums = moe_routing.combine(computed, plan, received.weights)
        must_lie_between("results", exchange.combine(sums, received), world.right())

    return Trial(_problem(world), called, launched)


def _problem(world: World) -> ExchangeProblem:
    case = world.case
    return ExchangeProblem(
        ranks=world.ranks,
        experts_per_rank=case.experts,
        reduce=case.reduce,
        shared_batch=case.shared,
        max_tokens=max(len(one.ids) for one in world.drawn) if case.padded else 0,
    )


@check(0, _modes)
def what_it_accepts_works(under_test: BackendUnderTest, case: Case) -> None:
    """Every mode that the transport accepts is exchanged, and is right."""
    honest.must_serve_what_it_accepts(under_test, [_trial(under_test, case)])


@check(0, _modes)
def what_it_declines_fails(under_test: BackendUnderTest, case: Case) -> None:
    """What the transport declines, built all the same, fails or is wrong, or its spec says why."""
    honest.must_fail_at_what_it_declines(under_test, [_trial(under_test, case)])


@check(0, gaps.every_gap)
def a_declared_gap_is_real(under_test: BackendUnderTest, case: gaps.Gap) -> None:
    """What the spec declares a gap in is declined, or tried and found to fail."""
    gaps.must_be_real(under_test, case)
