"""Clauses 1 and 2: rows, and results."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch

from moe_routing.conformance import drawn
from moe_routing.conformance.exchange import _sets, outcomes
from moe_routing.conformance.exchange._check import check
from moe_routing.conformance.exchange.cases import TOKENS
from moe_routing.conformance.permutation.outcomes import same_bits
from moe_routing.conformance.permutation.values import DTYPES
from moe_routing.conformance.requirements import require

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.exchange.cases import Case
    from moe_routing.conformance.under_test import BackendUnderTest

_SIZES = (
    {"columns": 1, "topk": 1},
    {"columns": 130, "topk": 8, "experts": 16},
    {"columns": 40, "topk": 2, "tokens": "many"},
)


def _moved(profile: Profile) -> Iterator[Case]:
    dtypes = ("bfloat16", "float8_e4m3fn") if profile == "smoke" else DTYPES
    for dtype in dtypes:
        for case in _sets.every_mode(profile, dtype=dtype, rows="bits"):
            yield case.but(scales=dtype.startswith("float8"))
    if profile != "smoke":
        for size in _SIZES:
            yield from _sets.every_mode(profile, rows="bits", **size)


@check(1, _moved)
def rows_arrive_in_order_bit_for_bit(under_test: BackendUnderTest, case: Case) -> None:
    """A rank gets the rows of its experts, and their scales, by expert, rank, token and slot."""
    world = case.make(under_test.device)
    outcomes.rows_must_be_right(world, *outcomes.dispatched(world, world.parallel(under_test)))


def _modes(profile: Profile) -> Iterator[Case]:
    yield from _sets.every_mode(profile, ids="strays")


@check(1, _modes)
def what_arrives_names_experts_of_this_rank(under_test: BackendUnderTest, case: Case) -> None:
    """Rows as they arrive have int32 ids of this rank's experts, and -1 in slots without one."""
    world = case.make(under_test.device)
    received = world.parallel(under_test).dispatch_rows(*world.mine[:3])
    slots = 1 if case.reduce == "none" else case.topk
    shape, dtype = list(received.ids.shape), received.ids.dtype
    expected = [len(received.rows), slots]
    require(shape == expected, f"ids: expected shape {expected}, got {shape}")
    require(dtype == torch.int32, f"ids: expected int32, got {dtype}")
    ids = received.ids.cpu()
    inside = (ids >= -1) & (ids < max(1, len(world.experts)))
    require(inside.all(), "ids: some are neither an expert of this rank nor -1")
    weighted = received.weights is not None
    require(
        weighted == (case.reduce == "rank"), f"weights: expected them with sums, got {weighted}"
    )
    counted = sorted(ids[ids >= 0].tolist())
    right = sorted(world.experts.index(one.expert) for one in world.arrivals())
    require(counted == right, "ids: some experts have more or fewer rows than tokens chose them")


def _results(profile: Profile) -> Iterator[Case]:
    for words in (
        {},
        {"dtype": "float32", "weights": "bfloat16", "wider": True},
        {"dtype": "float16", "weights": "float16", "ids_dtype": "int64"},
        {"dtype": "float8_e4m3fn", "scales": True},
    )[: 2 if profile == "smoke" else 4]:
        yield from _sets.every_mode(profile, **words)
    if profile != "smoke":
        for size in _SIZES:
            yield from _sets.every_mode(profile, **size)


@check(2, _results)
def results_come_back_weighted_and_summed(under_test: BackendUnderTest, case: Case) -> None:
    """Each token gets the sum over its slots of weight times result, within rounding."""
    world = case.make(under_test.device)
    outcomes.must_be_right(world, outcomes.exchanged(world, world.parallel(under_test)))


_DRAWN = {"smoke": 2, "quick": 8, "full": 60}
"""How many cases are drawn."""


def _drawn(profile: Profile) -> Iterator[Case]:
    seed = drawn.current_seed()
    numbers = random.Random(seed)  # noqa: S311 -- not a secret
    modes = list(_sets.every_mode(profile))
    # As shuffled cards, that a few draws are not all of ranks with a token or none.
    tokens = numbers.sample(sorted(TOKENS), len(TOKENS))
    for turn in range(_DRAWN[profile]):
        experts = numbers.randint(1, 40)
        yield numbers.choice(modes).but(
            tokens=tokens[turn % len(tokens)],
            experts=experts,
            topk=numbers.randint(1, min(experts, 12)),
            columns=numbers.randint(1, 200),
            dtype=numbers.choice(("bfloat16", "float16", "float32")),
            weights=numbers.choice(("bfloat16", "float16", "float32")),
            ids_dtype=numbers.choice(("int32", "int64")),
            placement=numbers.choice(("even", "mapped", "one_rank")),
            ids=numbers.choice(("experts", "strays", "repeated")),
            scales=numbers.choice((False, True)),
            strided=numbers.choice((False, True)),
            turn=turn,
            seed=seed,
        )


@check(2, _drawn)
def drawn_exchanges_are_right(under_test: BackendUnderTest, case: Case) -> None:
    """Exchanges that a seed drew are right."""
    world = case.make(under_test.device)
    outcomes.must_be_right(world, outcomes.exchanged(world, world.parallel(under_test)))


def _unreduced(profile: Profile) -> Iterator[Case]:
    for dtype in ("bfloat16", "float32"):
        for tokens in ("mixed",) if profile == "smoke" else ("mixed", "one", "many"):
            yield from _sets.unreduced(profile, dtype=dtype, tokens=tokens, topk=4)


@check(2, _unreduced)
def unreduced_rows_give_the_bits_of_one_rank(under_test: BackendUnderTest, case: Case) -> None:
    """With a row of each slot, results have the bits of one rank that has all experts."""
    world = case.make(under_test.device)
    made = outcomes.exchanged(world, world.parallel(under_test)).result
    right = world.of_this_rank(world.on_one_rank(world.whole()))
    require(same_bits(made, right), "results have other bits than those of one rank")
