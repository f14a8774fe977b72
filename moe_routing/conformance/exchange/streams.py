"""Clause 8: synchronisation and CUDA graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moe_routing.conformance import streams
from moe_routing.conformance.exchange import _sets, outcomes, ranks
from moe_routing.conformance.exchange._check import check
from moe_routing.conformance.permutation.outcomes import must_lie_between

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.exchange.cases import Case
    from moe_routing.conformance.under_test import BackendUnderTest

TURNS = 3


def _modes(profile: Profile) -> Iterator[Case]:
    for tokens in ("one", "same"):
        yield from _sets.without_sizes(profile, tokens=tokens, dtype="float32")


class _OnDevice:
    """A world whose experts are computed without a look at the plan on the host."""

    def __init__(self, case: Case, under_test: BackendUnderTest) -> None:
        """Put what experts are onto the device."""
        self.world = case.make(under_test.device)
        self.ep = self.world.parallel(under_test)
        self._factors = self.world.factors[self.world.experts].to(under_test.device)

    def exchanged(self) -> Tensor:
        """Exchange there and back."""
        rows, _, plan = outcomes.dispatched(self.world, self.ep)
        place = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
        expert = torch.searchsorted(plan.offsets[1:], place, right=True)
        factors = self._factors[expert.clamp(max=len(self._factors) - 1)]
        return self.ep.combine(rows * factors[:, None])


@check(8, _modes)
def nothing_is_read_on_the_host(under_test: BackendUnderTest, case: Case) -> None:
    """A call that needs no sizes does not synchronise with the device."""
    streams.need_cuda(under_test)
    on_device = _OnDevice(case, under_test)
    on_device.exchanged()
    with streams.without_synchronisation(under_test.device):
        made = on_device.exchanged()
    must_lie_between("results", made, on_device.world.right())


@check(8, _modes, capability="cuda_graphs")
def a_cuda_graph_replays_with_new_operands(under_test: BackendUnderTest, case: Case) -> None:
    """A graph that is captured after warm-up calls replays with other tokens and ids."""
    streams.need_cuda(under_test)
    on_device = _OnDevice(case, under_test)
    on_device.exchanged()
    graph, made = streams.captured(under_test.device, on_device.exchanged)
    with ranks.to_the_end() as hold:
        for turn in range(1, TURNS + 1):
            other = case.but(turn=turn).make(under_test.device)
            for part, new in zip(on_device.world.mine, other.mine, strict=True):
                if part is not None and new is not None:
                    part.copy_(new)
            streams.replay(graph, under_test.device)
            hold(must_lie_between, "results of a replay", made, other.right())
