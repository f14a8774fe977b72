"""Clause 8: synchronisation and CUDA graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moe_routing.conformance import streams
from moe_routing.conformance.exchange import _sets, outcomes, ranks
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


class OnDevice:
    """A world whose experts are computed without a look at the plan on the host.

    :ivar world: this rank's operands; a graph reads them where they lie.
    :ivar ep: what exchanges them.
    """

    def __init__(self, case: Case, under_test: BackendUnderTest, **words: Any) -> None:  # noqa: ANN401 -- the arguments
        """Put what experts are onto the device.

        :param words: arguments of the ``ExpertParallel``.
        """
        self.world = case.make(under_test.device)
        self.ep: ExpertParallel = self.world.parallel(under_test, **words)
        self._factors = self.world.factors[self.world.experts].to(under_test.device)

    def exchanged(self) -> Tensor:
        """Exchange there and back."""
        rows, _, plan = outcomes.dispatched(self.world, self.ep)
        place = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
        expert = torch.searchsorted(plan.offsets[1:], place, right=True)
        factors = self._factors[expert.clamp(max=len(self._factors) - 1)]
        return self.ep.combine(rows * factors[:, None])

    def takes(self, other: World) -> None:
        """Put the operands of another world where this one's lie."""
        for part, new in zip(self.world.mine, other.mine, strict=True):
            if part is not None and new is not None:
                part.copy_(new)


@check(8, _modes)
def nothing_is_read_on_the_host(under_test: BackendUnderTest, case: Case) -> None:
    """A call that needs no sizes does not synchronise with the device."""
    streams.need_cuda(under_test)
    on_device = OnDevice(case, under_test)
    on_device.exchanged()
    with streams.without_synchronisation(under_test.device):
        made = on_device.exchanged()
    must_lie_between("results", made, on_device.world.right())


@check(8, _modes, capability="cuda_graphs")
def a_cuda_graph_replays_with_new_operands(under_test: BackendUnderTest, case: Case) -> None:
    """A graph that is captured after warm-up calls replays with other tokens and ids."""
    streams.need_cuda(under_test)
    on_device = OnDevice(case, under_test)
    on_device.exchanged()
    graph, made = streams.captured(under_test.device, on_device.exchanged)
    with ranks.to_the_end() as hold:
        for turn in range(1, TURNS + 1):
            other = case.but(turn=turn).make(under_test.device)
            on_device.takes(other)
            streams.replay(graph, under_test.device)
            hold(must_lie_between, "results of a replay", made, other.right())


def _one_token(profile: Profile) -> Iterator[Case]:
    yield from _sets.without_sizes(profile, tokens="one", dtype="float32")


@check(8, _one_token, capability="cuda_graphs")
def graphs_of_several_sizes_replay_in_turn(under_test: BackendUnderTest, case: Case) -> None:
    """Graphs of one layer for different numbers of tokens replay one after the other."""
    streams.need_cuda(under_test)
    large = OnDevice(case.but(tokens="same"), under_test)
    small = OnDevice(case, under_test)
    small.ep = large.ep
    graphs = []
    for one in (large, small):
        one.exchanged()
        graphs.append(streams.captured(under_test.device, one.exchanged))
    with ranks.to_the_end() as hold:
        for turn in range(1, TURNS + 1):
            for one, (graph, made) in zip((large, small), graphs, strict=True):
                other = one.world.case.but(turn=turn).make(under_test.device)
                one.takes(other)
                streams.replay(graph, under_test.device)
                hold(must_lie_between, "results of a replay", made, other.right())


@check(8, _one_token)
def two_layers_exchange_on_two_streams(under_test: BackendUnderTest, case: Case) -> None:
    """Two layers exchange at the same time, each on a stream of its own."""
    streams.need_cuda(under_test)
    layers = [OnDevice(case.but(tokens="same", turn=turn), under_test) for turn in (0, 1)]
    for layer in layers:
        layer.exchanged()
    torch.cuda.synchronize(under_test.device)
    of_each = [torch.cuda.Stream(under_test.device) for _ in layers]
    made: list[tuple[OnDevice, Tensor]] = []
    for _ in range(TURNS):
        for layer, stream in zip(layers, of_each, strict=True):
            with torch.cuda.stream(stream):
                made.append((layer, layer.exchanged()))
    torch.cuda.synchronize(under_test.device)
    with ranks.to_the_end() as hold:
        for layer, result in made:
            hold(must_lie_between, "results on two streams", result, layer.world.right())
