"""Clause 10: a capacity that was too small is told, and loses no token without a word."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moe_routing.conformance import streams
from moe_routing.conformance.exchange import _sets, outcomes, ranks
from moe_routing.conformance.exchange._check import check
from moe_routing.conformance.exchange.streams import OnDevice
from moe_routing.conformance.permutation.outcomes import must_lie_between
from moe_routing.conformance.requirements import require
from moe_routing.distributed import CapacityError
from moe_routing.reference.permutation_oracle import Between

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.exchange.cases import Case, World
    from moe_routing.conformance.under_test import BackendUnderTest


def _modes(profile: Profile) -> Iterator[Case]:
    for tokens in ("mixed",) if profile == "smoke" else ("mixed", "many", "some_none"):
        for case in _sets.without_sizes(profile, tokens=tokens, ids="strays"):
            if case.padded:  # a capacity needs the most tokens
                yield case


def _needed(world: World) -> int:
    """Return the most rows that a rank has for another."""
    most = 0
    for one in world.drawn:
        ids = one.ids.long()
        known = (ids >= 0) & (ids < len(world.placement))
        of = torch.tensor(world.placement)[torch.where(known, ids, 0)]
        for rank in range(world.ranks):
            here = known & (of == rank)
            rows = here if world.case.reduce == "none" else here.any(1)
            most = max(most, int(rows.sum()))
    return most


def _raised(call: Callable[[], object]) -> str:
    """Return what a call says of the capacity; ``""`` if nothing."""
    try:
        call()
    except CapacityError as error:
        return str(error) or "nothing"
    return ""


@check(10, _modes)
def what_fits_is_right_and_no_error(under_test: BackendUnderTest, case: Case) -> None:
    """A capacity of as many rows as there are changes nothing, with gradients and without."""
    world = case.make(under_test.device)
    ep = world.parallel(under_test, capacity=max(1, _needed(world)))
    with ranks.to_the_end() as hold:
        for recorded in (False, True):
            world.mine.hidden.requires_grad_(recorded)
            hold(outcomes.must_be_right, world, outcomes.exchanged(world, ep))
        said = _raised(ep.check)
        hold(require, not said, f"check() raised though every row had a place: {said}")


def _nan_or_right(world: World, result: Tensor, hold: Callable[..., None]) -> bool:
    """Hold results that may be NaN; return whether some are, on any rank."""
    lost = result.isnan().any(1)
    hold(require, result[lost].isnan().all(), "a token is NaN in some of its columns alone")
    kept = ~lost.cpu()
    least, greatest = (part[kept] for part in world.right())
    hold(must_lie_between, "results that are not NaN", result[~lost], Between(least, greatest))
    return any(ranks.heard(bool(lost.any())))


@check(10, _modes)
def what_overflows_is_nan_and_told(under_test: BackendUnderTest, case: Case) -> None:
    """Tokens are NaN or right; if some are NaN, every rank raises from then on."""
    world = case.make(under_test.device)
    ep = world.parallel(under_test, capacity=max(1, _needed(world) // 2))
    with ranks.to_the_end() as hold:
        lost = _nan_or_right(world, outcomes.exchanged(world, ep).result, hold)
        calls = (ep.check, lambda: outcomes.exchanged(world, ep))
        for what, call in zip(("check()", "the dispatch after it"), calls, strict=True):
            said = _raised(call)
            hold(require, lost or not said, f"{what} raised though no token is NaN: {said}")
            hold(require, said or not lost, f"{what} raised nothing, though tokens are NaN")
            if said:
                hold(require, said.startswith("capacity: "), f"the error does not say why: {said}")


@check(10, _modes, capability="cuda_graphs")
def a_replay_that_overflows_is_told(under_test: BackendUnderTest, case: Case) -> None:
    """A graph that was captured when all rows had places makes tokens NaN when they have none."""
    streams.need_cuda(under_test)
    needed = _needed(case.make(under_test.device))
    on_device = OnDevice(case, under_test, capacity=max(1, needed // 2))
    world = case.make(under_test.device)
    on_device.world.mine.ids.fill_(-1)  # nothing is sent
    on_device.exchanged()
    graph, made = streams.captured(under_test.device, on_device.exchanged)
    with ranks.to_the_end() as hold:
        hold(require, not _raised(on_device.ep.check), "check() raised though nothing was sent")
        on_device.takes(world)
        streams.replay(graph, under_test.device)
        lost = _nan_or_right(world, made, hold)
        told = _raised(on_device.ep.check)
        hold(require, bool(told) == lost, f"tokens are NaN: {lost}, and check() raised {told!r}")
