"""Clauses 3, 4 and 5: blocks, capacities and the masked layout."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

from moe_routing.conformance.planning import cases, ids
from moe_routing.conformance.planning._check import check
from moe_routing.conformance.planning.cases import Case

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.under_test import BackendUnderTest

BLOCKS = (1, 2, 3, 16, 24, 64, 100, 128, 1000)
SIZES = ((33, 8, 64), (1, 1, 64), (2, 3, 7), (257, 6, 300), (64, 10, 512))
"""T, K and E: with more pairs than experts, and with fewer."""


def _blocks(profile: Profile) -> Iterator[Case]:
    for block, (tokens, topk, experts) in product(BLOCKS, SIZES[: 2 if profile == "smoke" else 5]):
        yield Case(num_tokens=tokens, topk=topk, num_experts=experts, block=block)
    if profile != "smoke":
        for kind in (*ids.INSIDE, "padding", "none"):
            yield Case(num_tokens=40, ids=kind, block=16)
            yield Case(num_tokens=300, ids=kind, block=128)


@check(3, _blocks)
def experts_begin_at_multiples_of_the_block(under_test: BackendUnderTest, case: Case) -> None:
    """Blocks of any size begin at multiples of it; what has no pair holds T * K or -1."""
    cases.checked(under_test, case.make(under_test.device))


CAPACITIES = (1, 2, 5, 300, 2**31 - 1)
"""The first three drop pairs of the case below; the others drop none, or those of one expert."""


def _last(profile: Profile) -> Iterator[Case]:
    kinds = ("random", "first_expert", "repeated", "padding")
    for capacity, kind in product(CAPACITIES, kinds[: 2 if profile == "smoke" else 4]):
        for block in (None, 16)[: 1 if profile == "smoke" else 2]:
            yield Case(capacity=capacity, ids=kind, block=block)
            if profile != "smoke":
                yield Case(
                    capacity=capacity, ids=kind, block=block, num_tokens=700, topk=2, num_experts=3
                )


@check(4, _last)
def the_last_pairs_of_an_expert_are_dropped(under_test: BackendUnderTest, case: Case) -> None:
    """Beyond a capacity the last pairs of an expert are dropped, and num_dropped counts them."""
    cases.checked(under_test, case.make(under_test.device))


def _least(profile: Profile) -> Iterator[Case]:
    capacities = (3,) if profile == "smoke" else (1, 3, 2**31 - 1)
    for capacity, weights in product(capacities, ids.WEIGHTS):
        yield Case(capacity=capacity, drop="least_weight", weights=weights)
        if profile != "smoke":
            for block, kind in ((None, "padding"), (16, "random"), (32, "first_expert")):
                yield Case(
                    capacity=capacity, drop="least_weight", weights=weights, block=block, ids=kind,
                    num_tokens=257, num_experts=20,
                )  # fmt: skip


@check(4, _least)
def the_pairs_of_least_weight_are_dropped(under_test: BackendUnderTest, case: Case) -> None:
    """Those of least weight are dropped: of equal ones the last; -0 equals 0, NaN is -inf."""
    cases.checked(under_test, case.make(under_test.device))


def _masked(profile: Profile) -> Iterator[Case]:
    kinds: tuple[str, ...] = ("random", "last_expert")
    if profile != "smoke":
        kinds = (*ids.INSIDE, "padding", "other_ranks")
    for capacity, kind in product((1, 7, 300), kinds):
        yield Case(masked=True, capacity=capacity, ids=kind)
        if profile != "smoke":
            yield Case(masked=True, capacity=capacity, ids=kind, num_tokens=129, num_experts=257)
            yield Case(masked=True, capacity=capacity, ids=kind, drop="least_weight")


@check(5, _masked)
def each_expert_has_a_row_of_its_own(under_test: BackendUnderTest, case: Case) -> None:
    """Each expert's pairs are at the beginning of its row of the matrix, and T * K after them."""
    cases.checked(under_test, case.make(under_test.device))
