"""Clauses 10 and 11: a row's bits depend on nothing but the row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moe_routing.conformance.checks import _sets
from moe_routing.conformance.checks._check import check
from moe_routing.conformance.requirements import require
from moe_routing.conformance.under_test import same_bits

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moe_routing.conformance.cases import Case, Profile
    from moe_routing.conformance.under_test import BackendUnderTest
    from moe_routing.kernel import RoutingOutput

RUNS = 100


def _batches(profile: Profile) -> Iterator[Case]:
    tokens = {"smoke": 67, "quick": 2053, "full": 2053}[profile]
    yield from _sets.of_every_variant("smoke", tokens=tokens)
    if profile != "smoke":
        yield from _sets.of_every_family("quick", tokens=tokens, dtype="bfloat16")
        for case in _sets.of_every_family("quick", tokens=tokens):
            yield case.but(recorded=True)


@check(10, _batches)
def a_rows_bits_do_not_depend_on_its_batch(under_test: BackendUnderTest, case: Case) -> None:
    """Rows give the same bits together, permuted, in batches of many sizes, and alone."""
    call = case.make(under_test.device)
    whole = under_test.route(call)
    order = torch.randperm(case.num_tokens, generator=case.generator()).to(under_test.device)
    _must_equal(under_test.route(call.rows(order)), whole, order, "permuted")
    start = 0
    for size in (1, 1, 2, 3, 7, 33, 64, 129, 512, 1024):
        stop = min(start + size, case.num_tokens)
        part = slice(start, stop)
        _must_equal(under_test.route(call.rows(part)), whole, part, f"in a batch of {stop - start}")
        start = stop if stop < case.num_tokens else 0


def _must_equal(
    some: RoutingOutput, whole: RoutingOutput, rows: torch.Tensor | slice, how: str
) -> None:
    for name, part, everything in (
        ("ids", some.ids, whole.ids),
        ("weights", some.weights, whole.weights),
    ):
        if not same_bits(part, everything[rows]):
            row = int((part != everything[rows]).any(-1).nonzero()[0])
            msg = (
                f"{name} of a row {how}: {part[row].tolist()}, "
                f"in the whole: {everything[rows][row].tolist()}"
            )
            raise AssertionError(msg)


def _repeated(profile: Profile) -> Iterator[Case]:
    for case in _sets.of_every_family(profile):
        yield case
        yield case.but(kind="ties")


@check(11, _repeated)
def the_same_input_gives_the_same_bits(under_test: BackendUnderTest, case: Case) -> None:
    """A hundred runs give the same bits, ties included."""
    call = case.make(under_test.device)
    first = under_test.route(call)
    for run in range(RUNS):
        again = under_test.route(call)
        require(
            same_bits(again.ids, first.ids) and same_bits(again.weights, first.weights),
            f"run {run + 1} differs from run 0",
        )
