"""Clauses 1, 2 and 3 of ``permute``: rows, empty places, quantized rows."""

from __future__ import annotations

import random
from itertools import cycle, product
from typing import TYPE_CHECKING, Any

import torch

import moe_routing
from moe_routing.conformance import drawn
from moe_routing.conformance.permutation import _sets, values
from moe_routing.conformance.permutation._check import PERMUTE
from moe_routing.conformance.permutation.cases import PermuteCase
from moe_routing.conformance.planning import ids
from moe_routing.conformance.requirements import require
from moe_routing.conformance.under_test import NotRunError
from moe_routing.permutation import PermutedRows
from moe_routing.permutation.problem import FLOATS
from moe_routing.reference import permutation_oracle as oracle

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.permutation.cases import Case
    from moe_routing.conformance.under_test import BackendUnderTest

check = PERMUTE.check

TOKENS = (1, 2, 3, 5, 64, 257, 1031)
TOPK = (1, 2, 6, 8, 10, 64)
COLUMNS = (1, 2, 3, 7, 8, 16, 31, 64, 127, 128, 129, 255, 520, 1000, 2048, 2816, 7168, 8193)
PAST_16_BITS = (1 << 16) + 1
MOST = 1 << 21
"""Elements of a result up to which a case takes a fraction of a second."""


def sizes(operation: type[Case], profile: Profile) -> Iterator[Case]:
    """Yield every H with some T and K, in turn; with every T and K for full."""
    if profile == "full":
        for tokens, topk, columns in product(TOKENS, TOPK, COLUMNS):
            if tokens * topk * columns <= 8 * MOST:
                yield operation(num_tokens=tokens, topk=topk, columns=columns)
        return
    turns, slots, dtypes = cycle(TOKENS), cycle(TOPK), cycle(FLOATS)
    for columns in COLUMNS:
        for _ in range(1 if profile == "smoke" else 4):
            tokens, topk, dtype = next(turns), next(slots), next(dtypes)
            if tokens * topk * columns <= MOST:
                yield operation(num_tokens=tokens, topk=topk, columns=columns, dtype=dtype)
        next(turns)  # so that an H does not always meet the same T


def _dtypes(profile: Profile) -> Iterator[PermuteCase]:
    for n, dtype in enumerate(values.DTYPES):
        for m, layout in enumerate(_sets.LAYOUTS):
            if profile != "smoke" or n % len(_sets.LAYOUTS) == m:
                yield PermuteCase(dtype=dtype, rows="bits", columns=37, **layout)
                yield PermuteCase(dtype=dtype, rows="bits", columns=128, num_tokens=5, **layout)


@check(1, _dtypes)
def rows_of_every_dtype_are_moved_bit_for_bit(
    under_test: BackendUnderTest, case: PermuteCase
) -> None:
    """Rows of every dtype, of any bits, stand at the places of their tokens, to the bit."""
    case.make(under_test.device).checked(under_test)


def _sizes(profile: Profile) -> Iterator[Case]:
    for case in sizes(PermuteCase, profile):
        yield case.but(rows="bits")


@check(1, _sizes)
def rows_of_every_size_are_moved(under_test: BackendUnderTest, case: PermuteCase) -> None:
    """Rows of any number of columns are moved, of any numbers of tokens and slots."""
    case.make(under_test.device).checked(under_test)


def _many(profile: Profile) -> Iterator[PermuteCase]:
    yield PermuteCase(num_tokens=PAST_16_BITS, topk=1, columns=3)
    if profile != "smoke":
        yield PermuteCase(num_tokens=PAST_16_BITS, topk=2, columns=8, block=16)
        yield PermuteCase(num_tokens=PAST_16_BITS, topk=1, columns=2, quantize=True)


@check(1, _many)
def tokens_past_65_535_are_permuted(under_test: BackendUnderTest, case: PermuteCase) -> None:
    """More tokens than a 16-bit number counts are permuted."""
    case.make(under_test.device).checked(under_test)


_DRAWN = {"smoke": 6, "quick": 30, "full": 400}


def drawn_cases(operation: type[Case], profile: Profile) -> Iterator[Case]:
    """Yield cases whose sizes, ids, memory and layout the run's seed draws."""
    seed = drawn.current_seed()
    numbers = random.Random(seed)  # noqa: S311 -- not a secret
    for _ in range(_DRAWN[profile]):
        layout = dict(numbers.choice(_sets.LAYOUTS))
        for name in ("block", "capacity"):
            if name in layout:
                layout[name] = numbers.choice((1, numbers.randint(1, 40)))
        layout["ids"] = numbers.choice(sorted(ids.KINDS))
        yield operation(
            num_tokens=numbers.choice((numbers.randint(1, 40), numbers.randint(1, 600))),
            topk=numbers.choice((numbers.randint(1, 12), numbers.randint(1, 64))),
            num_experts=numbers.randint(1, 64),
            columns=numbers.choice((numbers.randint(1, 40), numbers.randint(1, 400))),
            dtype=numbers.choice(FLOATS),
            memory=numbers.choice(sorted(values.MEMORY)),
            seed=seed,
            **layout,
        )


def _drawn(profile: Profile) -> Iterator[Case]:
    for n, case in enumerate(drawn_cases(PermuteCase, profile)):
        yield case.but(quantize=n % 3 == 0)


@check(1, _drawn)
def drawn_calls_are_permuted(under_test: BackendUnderTest, case: PermuteCase) -> None:
    """T, K, H, ids, strides, layout and dtype that the run's seed draws are permuted."""
    case.make(under_test.device).checked(under_test)


def _scaled(profile: Profile) -> Iterator[PermuteCase]:
    for layout in _sets.LAYOUTS:
        for dtype in ("float32", "complex128", "float8_e8m0fnu")[: 2 if profile == "smoke" else 3]:
            yield PermuteCase(dtype=dtype, rows="bits", columns=3, **layout)
            yield PermuteCase(dtype=dtype, rows="bits", columns=1, memory="transposed", **layout)


@check(1, _scaled)
def scales_are_moved_with_their_rows(under_test: BackendUnderTest, case: PermuteCase) -> None:
    """Scales of any dtype and number of columns are moved as their rows are."""
    of_scales = case.make(under_test.device)
    of_rows = case.but(dtype="float8_e4m3fn", columns=200, memory="contiguous").make(
        under_test.device
    )
    of_rows = of_rows.but(plan=of_scales.plan)
    with under_test.declining():
        made = moe_routing.permute(
            of_rows.hidden, of_rows.plan, scales=of_scales.hidden, backend=under_test.backend
        )
    require(isinstance(made, PermutedRows), f"expected PermutedRows, got {type(made)}")
    of_rows.must_match((made.rows,), "the rows")
    of_scales.must_match((made.scales,), "the scales")


def _past_int32(profile: Profile) -> list[PermuteCase]:
    huge = PermuteCase(dtype="uint8", num_tokens=32, topk=64, columns=(1 << 20) + 3)
    return [huge] if profile == "full" else []


@check(1, _past_int32, capability="large_sizes")
def more_than_2_31_elements_are_moved(under_test: BackendUnderTest, case: PermuteCase) -> None:
    """P * H past 2**31: every row is right."""
    if under_test.device.type == "cpu":
        msg = "2**31 elements are for accelerators"
        raise NotRunError(msg)
    call = case.but(rows="bits").make(under_test.device)
    # The allocator may hand out memory that holds what another backend made, which is right.
    poison = values.around(call.hidden, (call.plan.order.numel(), case.columns), under_test.device)
    del poison
    (made,) = call.made(under_test)
    for place, token in enumerate(oracle.tokens(call.plan)):
        right = torch.equal(made[place], call.hidden[token])
        require(right, f"rows: the one at place {place} is wrong")


def _empty(profile: Profile) -> Iterator[PermuteCase]:
    layouts: tuple[dict[str, Any], ...] = (
        {"block": 16}, {"block": 3, "ids": "padding"}, {"ids": "strays"}, {"capacity": 2},
        {"ids": "none", "block": 4}, {"capacity": 3, "block": 5, "ids": "other_ranks"},
    )  # fmt: skip
    for layout, dtype in product(layouts, ("float32", "bfloat16", "float8_e4m3fn", "int64")):
        yield PermuteCase(dtype=dtype, rows="bits", **layout)
    for layout, quantize in product(layouts, (False, True)):
        yield PermuteCase(rows="not_finite", quantize=quantize, columns=130, **layout)
        if profile != "smoke":
            yield PermuteCase(
                rows="bits", quantize=quantize, columns=7, num_tokens=300, num_experts=60, **layout
            )


@check(2, _empty)
def empty_places_are_zero(under_test: BackendUnderTest, case: PermuteCase) -> None:
    """Places without a pair are zero in every byte, whatever rows and memory hold."""
    case.make(under_test.device).checked(under_test)


WIDTHS = (1, 7, 64, 127, 128, 129, 200, 256, 300, 1000)


def _quantized(profile: Profile) -> Iterator[PermuteCase]:
    kinds = ("normal", "cancelling", "levels", "tiny", "largest", "zeros")
    widths = cycle(WIDTHS)
    for dtype, kind in product(FLOATS, kinds):
        for _ in range(2 if profile == "smoke" else len(WIDTHS)):
            case = PermuteCase(dtype=dtype, rows=kind, quantize=True, columns=next(widths))
            yield case
            if profile != "smoke":
                yield case.but(num_tokens=129, block=16)
        next(widths)


@check(3, _quantized)
def quantized_rows_have_the_bits_of_float32(
    under_test: BackendUnderTest, case: PermuteCase
) -> None:
    """Quantized rows and their scales have the bits of float32 arithmetic, in every layout."""
    case.make(under_test.device).checked(under_test)


def _not_finite(_profile: Profile) -> Iterator[PermuteCase]:
    for dtype, kind, columns in product(FLOATS, ("not_finite", "infinite"), (64, 300)):
        yield PermuteCase(dtype=dtype, rows=kind, quantize=True, columns=columns)


@check(3, _not_finite)
def nan_and_infinity_stay_in_their_group(under_test: BackendUnderTest, case: PermuteCase) -> None:
    """NaN makes its group of a quantized row NaN; infinity becomes NaN, and its group's rest 0."""
    case.make(under_test.device).checked(under_test)
