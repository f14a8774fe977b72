"""Clauses 1 and 3 of ``combine``: sums in the order of the slots, NaN and infinity."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import torch

from moe_routing.conformance.permutation import _sets, moved
from moe_routing.conformance.permutation._check import COMBINE
from moe_routing.conformance.permutation.cases import CombineCase
from moe_routing.conformance.requirements import require
from moe_routing.conformance.under_test import NotRunError
from moe_routing.permutation.problem import FLOATS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.permutation.cases import Case
    from moe_routing.conformance.under_test import BackendUnderTest

check = COMBINE.check


def _sizes(profile: Profile) -> Iterator[Case]:
    return moved.sizes(CombineCase, profile)


@check(1, _sizes)
def sums_of_every_size_are_right(under_test: BackendUnderTest, case: CombineCase) -> None:
    """Sums of rows of any number of columns are right, of any numbers of tokens and slots."""
    case.make(under_test.device).checked(under_test)


def _dtypes(profile: Profile) -> Iterator[CombineCase]:
    for n, (dtype, weights) in enumerate(product(FLOATS, (*FLOATS, ""))):
        for m, layout in enumerate(_sets.LAYOUTS):
            if profile != "smoke" or n % len(_sets.LAYOUTS) == m:
                yield CombineCase(dtype=dtype, weights=weights, **layout)
                for kind in ("negative", "zeros", "large"):
                    yield CombineCase(dtype=dtype, weights=weights, weighing=kind, **layout)
                yield CombineCase(dtype=dtype, weights=weights, rows="tiny", **layout)


@check(1, _dtypes)
def rows_and_weights_of_every_dtype_are_summed(
    under_test: BackendUnderTest, case: CombineCase
) -> None:
    """Rows and weights of any of three dtypes, and rows without weights, are summed in float32."""
    case.make(under_test.device).checked(under_test)


def _cancelling(profile: Profile) -> Iterator[CombineCase]:
    for dtype, weights, topk in product(FLOATS, ("float32", ""), (3, 8, 22, 64)):
        for tokens in (7, 129)[: 1 if profile == "smoke" else 2]:
            yield CombineCase(
                dtype=dtype, weights=weights, topk=topk, num_tokens=tokens, rows="cancelling"
            )


@check(1, _cancelling)
def sums_follow_the_order_of_the_slots(under_test: BackendUnderTest, case: CombineCase) -> None:
    """Sums whose terms cancel are those of float32 from slot 0 to K - 1, rounded once."""
    case.make(under_test.device).checked(under_test)


def _many(profile: Profile) -> Iterator[CombineCase]:
    yield CombineCase(num_tokens=moved.PAST_16_BITS, topk=1, columns=3)
    if profile != "smoke":
        yield CombineCase(num_tokens=moved.PAST_16_BITS, topk=2, columns=8, weights="")


@check(1, _many)
def tokens_past_65_535_are_combined(under_test: BackendUnderTest, case: CombineCase) -> None:
    """More tokens than a 16-bit number counts are combined."""
    case.make(under_test.device).checked(under_test)


def _drawn(profile: Profile) -> Iterator[Case]:
    weights = (*FLOATS, "")
    for n, case in enumerate(moved.drawn_cases(CombineCase, profile)):
        yield case.but(weights=weights[n % len(weights)])


@check(1, _drawn)
def drawn_calls_are_combined(under_test: BackendUnderTest, case: CombineCase) -> None:
    """T, K, H, ids, strides, layout and dtypes that the run's seed draws are combined."""
    case.make(under_test.device).checked(under_test)


def _past_int32(profile: Profile) -> list[CombineCase]:
    huge = CombineCase(weights="", num_tokens=32, topk=64, columns=(1 << 20) + 3)
    return [huge] if profile == "full" else []


@check(1, _past_int32, capability="large_sizes")
def rows_past_2_31_elements_are_read(under_test: BackendUnderTest, case: CombineCase) -> None:
    """P * H past 2**31: the sums of all tokens are right."""
    if under_test.device.type == "cpu":
        msg = "2**31 elements are for accelerators"
        raise NotRunError(msg)
    call = case.but(columns=1).make(under_test.device)
    places = call.plan.order.numel()
    row = torch.arange(places, device=under_test.device) % 4  # sums that bfloat16 holds
    wide = row.to(torch.bfloat16)[:, None].repeat(1, case.columns)
    (made,) = call.but(rows=wide).made(under_test)
    sums = row[call.plan.inverse.long()].sum(1).to(torch.bfloat16)
    require(torch.equal(made, sums[:, None].expand_as(made)), "out: sums of last rows are wrong")


def _not_finite(profile: Profile) -> Iterator[CombineCase]:
    rows, weighing = ("not_finite", "infinite"), ("random", "zeros", "not_finite")
    for dtype, kind, weight in product(FLOATS, rows, weighing):
        for weights in ("float32", "")[: 1 if profile == "smoke" else 2]:
            yield CombineCase(dtype=dtype, rows=kind, weighing=weight, weights=weights)


@check(3, _not_finite)
def nan_and_infinity_that_are_read_come_out(
    under_test: BackendUnderTest, case: CombineCase
) -> None:
    """NaN and infinity of rows and weights that count reach their own sums, and no others."""
    case.make(under_test.device).checked(under_test)


def _largest(_profile: Profile) -> Iterator[CombineCase]:
    for dtype, weights, topk in product(FLOATS, ("float32", ""), (1, 2, 6)):
        yield CombineCase(dtype=dtype, rows="largest", weights=weights, topk=topk)
        yield CombineCase(dtype=dtype, rows="largest", weights=weights, topk=topk, weighing="large")


@check(3, _largest)
def sums_past_the_largest_number_are_infinite(
    under_test: BackendUnderTest, case: CombineCase
) -> None:
    """What exceeds the largest number of the rows' dtype when it is rounded is infinite."""
    case.make(under_test.device).checked(under_test)
