"""Clause 4: strides, operands that stay as they are, and rows that nobody computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moe_routing.conformance.exchange import _sets, outcomes
from moe_routing.conformance.exchange._check import check
from moe_routing.conformance.permutation.outcomes import same_bits
from moe_routing.conformance.requirements import require

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.exchange.cases import Case
    from moe_routing.conformance.under_test import BackendUnderTest


def _strided(profile: Profile) -> Iterator[Case]:
    for strided in (False, True):
        yield from _sets.every_mode(profile, strided=strided, dtype="float32")


@check(4, _strided)
def operands_of_any_strides_stay_as_they_are(under_test: BackendUnderTest, case: Case) -> None:
    """Operands may lie apart in memory, and are not written; results are contiguous."""
    world = case.make(under_test.device)
    parts = [part for part in world.mine if part is not None]
    before = [part.clone() for part in parts]
    made = outcomes.exchanged(world, world.parallel(under_test))
    outcomes.must_be_right(world, made)
    require(made.result.is_contiguous(), "results: expected contiguous ones")
    for name, part, old in zip(world.mine._fields, parts, before, strict=False):
        require(same_bits(part, old), f"{name} was changed")


def _partly(profile: Profile) -> Iterator[Case]:
    yield from _sets.every_mode(profile, ids="strays", topk=6, experts=8)


@check(4, _partly)
def rows_that_no_expert_computed_are_not_read(under_test: BackendUnderTest, case: Case) -> None:
    """What results hold behind the last expert's row changes nothing."""
    world = case.make(under_test.device)
    ep = world.parallel(under_test)
    rows, _, plan = outcomes.dispatched(world, ep)
    computed = world.computed(rows, plan)
    used = len(world.arrivals())
    made = []
    for rest in (torch.nan, 3.0):
        computed[used:] = rest
        outcomes.dispatched(world, ep)
        made.append(ep.combine(computed))
    require(same_bits(*made), "results depend on rows that belong to no expert")
