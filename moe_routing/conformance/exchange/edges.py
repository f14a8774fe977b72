"""Clause 3: slots without an expert, and ranks without tokens or experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_routing.conformance.exchange import _sets, outcomes
from moe_routing.conformance.exchange._check import check

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.exchange.cases import Case
    from moe_routing.conformance.under_test import BackendUnderTest


def _strays(profile: Profile) -> Iterator[Case]:
    for ids in ("strays", "repeated"):
        for dtype in ("int32", "int64"):
            yield from _sets.every_mode(profile, ids=ids, ids_dtype=dtype, topk=6, experts=8)


@check(3, _strays)
def padding_and_repeated_ids_are_exchanged(under_test: BackendUnderTest, case: Case) -> None:
    """An id of no expert sends and adds nothing; an id may stand in several slots of a row."""
    world = case.make(under_test.device)
    outcomes.must_be_right(world, outcomes.exchanged(world, world.parallel(under_test)))


def _empty(profile: Profile) -> Iterator[Case]:
    for tokens in ("some_none", "none", "one"):
        yield from _sets.every_mode(profile, tokens=tokens)


@check(3, _empty)
def ranks_without_tokens_take_part(under_test: BackendUnderTest, case: Case) -> None:
    """T may differ between ranks, and be 0 on some or on all of them."""
    world = case.make(under_test.device)
    outcomes.must_be_right(world, outcomes.exchanged(world, world.parallel(under_test)))


def _placed(profile: Profile) -> Iterator[Case]:
    yield from _sets.every_mode(profile, placement="mapped")
    yield from _sets.every_mode(profile, placement="one_rank", ids="strays")


@check(3, _placed)
def experts_may_be_anywhere(under_test: BackendUnderTest, case: Case) -> None:
    """A placement gives ranks any numbers of experts, in any order, and some none."""
    world = case.make(under_test.device)
    outcomes.must_be_right(world, outcomes.exchanged(world, world.parallel(under_test)))
