"""Clause 1: the order of pairs, in every size and for ids of every distribution."""

from __future__ import annotations

import random
from itertools import cycle, product
from typing import TYPE_CHECKING

from moe_routing.conformance import drawn
from moe_routing.conformance.planning import _sets, cases, ids
from moe_routing.conformance.planning._check import check
from moe_routing.conformance.planning.cases import Case

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.under_test import BackendUnderTest

TOKENS = (1, 2, 3, 5, 64, 257, 1024, 4099)
TOPK = (1, 2, 6, 8, 10, 64)
EXPERTS = (1, 2, 3, 60, 64, 128, 160, 255, 256, 257, 384, 512, 1000, 1024, 4096)
PAST_16_BITS = (1 << 16) + 1
PAST_A_BLOCK = (1 << 16) + (1 << 12) + 1
"""More tokens than a 16-bit number counts: by one, and by one more than any block of tokens."""
MOST_PAIRS = 1 << 17
"""Pairs up to which the oracle takes a fraction of a second."""


def _sizes(profile: Profile) -> Iterator[Case]:
    """Yield every E with some K, and T in turn; with every K and T for full."""
    if profile == "full":
        for tokens, topk, experts in product((*TOKENS, PAST_16_BITS), TOPK, EXPERTS):
            if tokens * topk <= 8 * MOST_PAIRS:
                yield Case(num_tokens=tokens, topk=topk, num_experts=experts)
        return
    turns, columns = cycle(TOKENS), cycle(TOPK)
    for experts in EXPERTS:
        for _ in range(1 if profile == "smoke" else 4):
            tokens, topk = next(turns), next(columns)
            if tokens * topk <= MOST_PAIRS:
                yield Case(num_tokens=tokens, topk=topk, num_experts=experts)
        next(turns)  # so that an E does not always meet the same T


@check(1, _sizes)
def pairs_are_ordered_by_expert_token_and_slot(under_test: BackendUnderTest, case: Case) -> None:
    """Pairs come by expert, token and slot, with their inverse, counts and offsets, at any size."""
    cases.checked(under_test, case.make(under_test.device))


def _kinds(profile: Profile) -> Iterator[Case]:
    sizes = ((5, 2, 64), (257, 8, 64), (1031, 6, 300))[: 2 if profile == "smoke" else 3]
    for (tokens, topk, experts), kind in product(sizes, ids.INSIDE):
        yield Case(num_tokens=tokens, topk=topk, num_experts=experts, ids=kind)


@check(1, _kinds)
def ids_of_every_distribution_are_planned(under_test: BackendUnderTest, case: Case) -> None:
    """Ids ascend, descend, take turns, repeat in a row, or are all of one expert."""
    cases.checked(under_test, case.make(under_test.device))


def _many(profile: Profile) -> Iterator[Case]:
    yield Case(num_tokens=PAST_16_BITS, topk=1, num_experts=128)
    if profile == "smoke":
        return
    for tokens, experts, kind in (
        (PAST_16_BITS, 3, "random"),
        (PAST_16_BITS, 16, "last_expert"),
        (PAST_A_BLOCK, 257, "random"),
    ):
        yield Case(num_tokens=tokens, topk=2, num_experts=experts, ids=kind)
    yield Case(num_tokens=PAST_A_BLOCK, topk=1, num_experts=128, block=128)
    yield Case(num_tokens=PAST_A_BLOCK, topk=1, num_experts=128, capacity=500, masked=True)
    if profile == "full":
        for experts in (128, 512, 4096):
            yield Case(num_tokens=250_000, topk=8, num_experts=experts)


@check(1, _many)
def tokens_past_65_535_are_planned(under_test: BackendUnderTest, case: Case) -> None:
    """More tokens than a 16-bit number counts are planned, and more pairs of one expert."""
    cases.checked(under_test, case.make(under_test.device))


_DRAWN = {"smoke": 6, "quick": 30, "full": 400}


def _drawn(profile: Profile) -> Iterator[Case]:
    seed = drawn.current_seed()
    numbers = random.Random(seed)  # noqa: S311 -- not a secret
    for _ in range(_DRAWN[profile]):
        form = numbers.choice(_sets.FORMS)
        changed = {
            name: numbers.choice((1, numbers.randint(1, 200)))
            for name in ("block", "capacity")
            if name in form
        }
        experts = numbers.choice((numbers.randint(1, 300), numbers.randint(1, 4096)))
        dtype = numbers.choice(("int32", "int64"))
        kind = numbers.choice(sorted(ids.KINDS))
        yield Case(
            num_tokens=numbers.choice((numbers.randint(1, 40), numbers.randint(1, 3000))),
            topk=numbers.choice((numbers.randint(1, 12), numbers.randint(1, 64))),
            num_experts=experts,
            ids=kind,
            ids_dtype="int64" if kind == "wide_strays" else dtype,
            memory=numbers.choice(sorted(ids.MEMORY)),
            weights=numbers.choice(sorted(ids.WEIGHTS)),
            seed=seed,
            **{**form, **changed},
        )


@check(1, _drawn)
def drawn_calls_are_planned(under_test: BackendUnderTest, case: Case) -> None:
    """T, K, E, ids, strides, layout and policy that the run's seed draws are planned."""
    cases.checked(under_test, case.make(under_test.device))
