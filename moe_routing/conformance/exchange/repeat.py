"""Clause 6: the same bits in every run, and layers that are in flight at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moe_routing.conformance.exchange import _sets, outcomes, ranks
from moe_routing.conformance.exchange._check import check
from moe_routing.conformance.permutation.outcomes import same_bits
from moe_routing.conformance.requirements import require

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.exchange.cases import Case
    from moe_routing.conformance.under_test import BackendUnderTest

RUNS = 10


def _modes(profile: Profile) -> Iterator[Case]:
    yield from _sets.every_mode(profile, topk=6, experts=8)


@check(6, _modes)
def the_same_call_gives_the_same_bits(under_test: BackendUnderTest, case: Case) -> None:
    """Ten runs give the same bits, with other calls between them."""
    world, other = case.make(under_test.device), case.but(turn=1).make(under_test.device)
    ep = world.parallel(under_test)
    first = outcomes.exchanged(world, ep)
    with ranks.to_the_end() as hold:
        hold(outcomes.must_be_right, world, first)
        for run in range(2, RUNS + 1):
            hold(outcomes.must_be_right, other, outcomes.exchanged(other, ep), "another call")
            same = same_bits(outcomes.exchanged(world, ep).result, first.result)
            hold(require, same, f"run {run} of {RUNS} gives other bits")


@check(6, _modes)
def operands_changed_in_place_are_read_again(under_test: BackendUnderTest, case: Case) -> None:
    """Tokens, ids and weights may change between two calls, and results before them stay."""
    case = case.but(tokens="same")
    world, kept = case.make(under_test.device), case.make(under_test.device)
    ep = world.parallel(under_test)
    first = outcomes.exchanged(world, ep)
    with ranks.to_the_end() as hold:
        for turn in (1, 2):
            other = case.but(turn=turn).make(under_test.device)
            for part, new in zip(world.mine, other.mine, strict=True):
                if part is not None and new is not None:
                    part.copy_(new)
            other.mine = world.mine  # the same memory
            made = outcomes.exchanged(other, ep)
            hold(outcomes.must_be_right, other, made, "operands changed in place")
        hold(outcomes.must_be_right, kept, first, "the result of an earlier call")


@check(6, _modes)
def two_layers_may_be_in_flight(under_test: BackendUnderTest, case: Case) -> None:
    """Two layers dispatch before either combines, and each gets its own results."""
    worlds = [case.but(turn=turn).make(under_test.device) for turn in (0, 1)]
    layers = [world.parallel(under_test) for world in worlds]
    sent = [outcomes.dispatched(world, ep) for world, ep in zip(worlds, layers, strict=True)]
    with ranks.to_the_end() as hold:
        for world, ep, (rows, scales, plan) in zip(worlds, layers, sent, strict=True):
            result = ep.combine(world.computed(rows, plan))
            made = outcomes.Exchanged(rows, scales, plan, result)
            hold(outcomes.must_be_right, world, made, "two layers at once")


@check(6, _modes)
def what_a_call_returned_stays(under_test: BackendUnderTest, case: Case) -> None:
    """What arrived stays as it is when the same layer dispatches again, before it combines."""
    case = case.but(tokens="same")
    worlds = [case.but(turn=turn).make(under_test.device) for turn in (0, 1)]
    ep = worlds[0].parallel(under_test)
    with torch.no_grad():
        received = ep.dispatch_rows(*worlds[0].mine[:3])
        parts = [
            part for part in (received.rows, received.ids, received.weights) if part is not None
        ]
        before = [part.clone() for part in parts]
        ep.dispatch_rows(*worlds[1].mine[:3])
        outcomes.exchanged(worlds[1], ep)
    for part, kept in zip(parts, before, strict=True):
        require(same_bits(part, kept), "a later call changed what a call had returned")


@check(6, _modes)
def calls_follow_each_other_in_every_mode(under_test: BackendUnderTest, case: Case) -> None:
    """Calls with gradients, without them and in inference mode may follow each other."""
    world = case.make(under_test.device)
    ep = world.parallel(under_test)
    with ranks.to_the_end() as hold:
        for mode in (torch.enable_grad, torch.inference_mode, torch.no_grad, torch.enable_grad):
            with mode():
                made = outcomes.exchanged(world, ep)
                hold(outcomes.must_be_right, world, made, mode.__name__)
