"""Clauses 1 to 4: sums, counts, tokens that count, NaN."""

from __future__ import annotations

import random
from itertools import product
from typing import TYPE_CHECKING

import torch

from moe_routing.conformance import drawn
from moe_routing.conformance.balancing._check import check
from moe_routing.conformance.balancing.cases import DTYPES, IDS, KINDS, MASKS, MEMORY, Case
from moe_routing.conformance.requirements import require

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.under_test import BackendUnderTest

SIZES = (
    (1, 1, 1, 1), (1, 2, 2, 1), (1, 7, 3, 2), (1, 33, 8, 2), (3, 16, 60, 6), (1, 129, 64, 8),
    (5, 17, 128, 8), (2, 65, 160, 6), (1, 40, 256, 8), (1, 9, 384, 10), (7, 1, 512, 22),
    (1, 5, 2048, 8), (2, 3, 100, 64), (1, 1500, 32, 4), (200, 2, 5, 1),
)  # fmt: skip
"""B, S, E and K: about multiples of what kernels take at a time, of one program and of many."""


def _sizes(profile: Profile) -> Iterator[Case]:
    for n, (sizes, kind) in enumerate(product(SIZES, KINDS)):
        batches, tokens, experts, topk = sizes
        if profile != "smoke" or n % len(KINDS) == (n // len(KINDS)) % len(KINDS):
            yield Case(
                kind=kind, batches=batches, tokens=tokens, num_experts=experts, topk=topk,
                dtype=DTYPES[n % 3],
            )  # fmt: skip


@check(1, _sizes)
def sums_of_every_size_are_right(under_test: BackendUnderTest, case: Case) -> None:
    """Sums over any number of tokens, of any number of experts and batches, are right."""
    case.make(under_test.device).checked(under_test)


def _dtypes(profile: Profile) -> Iterator[Case]:
    for kind, dtype in product(KINDS, DTYPES):
        for logits in ("normal", "extreme"):
            if profile != "smoke" or kind != "best":
                yield Case(kind=kind, dtype=dtype, logits=logits, tokens=67)


@check(1, _dtypes)
def logits_of_every_dtype_and_size_are_summed(under_test: BackendUnderTest, case: Case) -> None:
    """Logits of four dtypes, near 0 and far from it, are summed without loss."""
    case.make(under_test.device).checked(under_test)


def _drawn(profile: Profile) -> Iterator[Case]:
    seed = drawn.current_seed()
    numbers = random.Random(seed)  # noqa: S311 -- not a secret
    for _ in range({"smoke": 5, "quick": 30, "full": 300}[profile]):
        experts = numbers.choice((numbers.randint(1, 64), numbers.randint(1, 400)))
        yield Case(
            kind=numbers.choice(KINDS),
            batches=numbers.choice((1, 1, 2, 5)),
            tokens=numbers.randint(1, 200),
            num_experts=experts,
            topk=numbers.randint(1, min(experts, 12)),
            dtype=numbers.choice(DTYPES),
            logits=numbers.choice(("normal", "extreme")),
            ids=numbers.choice(tuple(IDS)),
            ids_dtype=numbers.choice(("int32", "int64")),
            mask=numbers.choice(("", *MASKS)),
            memory=numbers.choice(MEMORY[:-1]),
            seed=seed,
        )


@check(1, _drawn)
def drawn_calls_are_summed(under_test: BackendUnderTest, case: Case) -> None:
    """Sizes, dtypes, masks and strides that the run's seed draws are summed."""
    case.make(under_test.device).checked(under_test)


def _ids(profile: Profile) -> Iterator[Case]:
    for ids, dtype in product(IDS, ("int32", "int64")):
        for experts, topk in ((16, 3), (60, 8), (3, 22))[: 1 if profile == "smoke" else 3]:
            for mask in ("", "some"):
                yield Case(ids=ids, ids_dtype=dtype, num_experts=experts, topk=topk, mask=mask)


@check(2, _ids)
def ids_are_counted(under_test: BackendUnderTest, case: Case) -> None:
    """Every id counts once for its expert, and ids outside [0, E) for nobody."""
    case.make(under_test.device).checked(under_test)


def _best(profile: Profile) -> Iterator[Case]:
    for (experts, topk), dtype in product(((16, 3), (60, 8), (8, 8), (1, 1)), DTYPES):
        for mask in ("", "some")[: 1 if profile == "smoke" and dtype != "bfloat16" else 2]:
            yield Case(kind="best", num_experts=experts, topk=topk, dtype=dtype, mask=mask)


@check(2, _best)
def the_best_are_counted(under_test: BackendUnderTest, case: Case) -> None:
    """Without ids the K highest scores of each token are counted, and rounded scores summed."""
    case.make(under_test.device).checked(under_test)


def _many(profile: Profile) -> Iterator[Case]:
    tokens = 70_000 if profile == "smoke" else 300_000
    yield Case(batches=1, tokens=tokens, num_experts=2, topk=1, ids="one")


@check(2, _many)
def counts_are_whole_numbers_of_any_size(under_test: BackendUnderTest, case: Case) -> None:
    """Counts past 65,535, which neither bfloat16 nor 16 bits hold, are exact."""
    call = case.make(under_test.device)
    _, counts = call.made(under_test)
    right = torch.tensor([[0, case.tokens]])
    require(torch.equal(counts.cpu(), right), f"counts: expected {right}, got {counts}")


def _masked(_profile: Profile) -> Iterator[Case]:
    for kind, mask, dtype in product(KINDS, MASKS, ("bfloat16", "float32")):
        yield Case(kind=kind, mask=mask, dtype=dtype, tokens=40)


@check(3, _masked)
def tokens_that_do_not_count_add_nothing(under_test: BackendUnderTest, case: Case) -> None:
    """Tokens outside the mask add nothing, though they hold NaN; weights are factors."""
    case.make(under_test.device).checked(under_test)


def _not_finite(_profile: Profile) -> Iterator[Case]:
    for kind, dtype in product(KINDS, ("bfloat16", "float32")):
        for tokens, experts in ((40, 16), (3, 100)):
            yield Case(kind=kind, dtype=dtype, tokens=tokens, num_experts=experts)


@check(4, _not_finite)
def nan_reaches_every_sum_of_its_batch(under_test: BackendUnderTest, case: Case) -> None:
    """One NaN makes every sum of its batch NaN, and no sum of another."""
    call = case.make(under_test.device)
    call.logits[1, case.tokens - 1, case.num_experts // 2] = torch.nan
    sums, _ = call.made(under_test)
    require(bool(sums[1].isnan().all()), "sums: a sum of the batch with NaN is none")
    alone = call.but(
        logits=call.logits[:1], ids=None if call.ids is None else call.ids[:1]
    )  # fmt: skip
    right = alone.made(under_test)[0]
    same = torch.allclose(sums[:1], right, rtol=1e-5, atol=0.0)
    require(same, "sums: NaN of another batch changes them")


@check(4, _not_finite)
def minus_infinity_is_a_score_of_0(under_test: BackendUnderTest, case: Case) -> None:
    """A logit of -infinity adds nothing to the sum of its expert, and spoils no other."""
    if case.kind == "best":
        case = case.but(topk=1)
    call = case.make(under_test.device)
    first = call.logits[..., 0]
    first.fill_(-torch.inf)
    call.checked(under_test)
