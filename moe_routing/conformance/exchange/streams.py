"""Clause 8: synchronisation and CUDA graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_routing.conformance import streams
from moe_routing.conformance.exchange import _sets, outcomes
from moe_routing.conformance.exchange._check import check
from moe_routing.conformance.permutation.outcomes import must_lie_between

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.exchange.cases import Case, World
    from moe_routing.conformance.under_test import BackendUnderTest
    from moe_routing.distributed import ExpertParallel

TURNS = 3


def _modes(profile: Profile) -> Iterator[Case]:
    for tokens in ("one", "same"):
        yield from _sets.without_sizes(profile, tokens=tokens, dtype="float32")


def _there_and_back(world: World, ep: ExpertParallel) -> Tensor:
    """Exchange rows that no expert changes: nothing here reads on the host."""
    rows, _, _ = outcomes.dispatched(world, ep)
    return ep.combine(rows)


def _unchanged(world: World) -> World:
    world.factors.fill_(1)
    return world


@check(8, _modes)
def nothing_is_read_on_the_host(under_test: BackendUnderTest, case: Case) -> None:
    """A call that needs no sizes does not synchronise with the device."""
    streams.need_cuda(under_test)
    world = _unchanged(case.make(under_test.device))
    ep = world.parallel(under_test)
    _there_and_back(world, ep)
    with streams.without_synchronisation(under_test.device):
        made = _there_and_back(world, ep)
    must_lie_between("results", made, world.right())


@check(8, _modes, capability="cuda_graphs")
def a_cuda_graph_replays_with_new_operands(under_test: BackendUnderTest, case: Case) -> None:
    """A graph that is captured after warm-up calls replays with other tokens and ids."""
    streams.need_cuda(under_test)
    world = _unchanged(case.make(under_test.device))
    ep = world.parallel(under_test)
    _there_and_back(world, ep)
    graph, made = streams.captured(under_test.device, lambda: _there_and_back(world, ep))
    for turn in range(1, TURNS + 1):
        other = _unchanged(case.but(turn=turn).make(under_test.device))
        for part, new in zip(world.mine, other.mine, strict=True):
            if part is not None and new is not None:
                part.copy_(new)
        streams.replay(graph, under_test.device)
        must_lie_between("results of a replay", made, other.right())
