"""Clause 2 of ``combine``, and clause 5 of both: pairs and rows without a place, and any plan."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from moe_routing.conformance.permutation import _sets, outcomes
from moe_routing.conformance.permutation._check import COMBINE, both
from moe_routing.conformance.permutation.calls import CombineCall, PermuteCall
from moe_routing.conformance.permutation.cases import CombineCase, on_device
from moe_routing.conformance.permutation.memory import BEFORE, launched
from moe_routing.conformance.requirements import require
from moe_routing.permutation.problem import FLOATS
from moe_routing.reference import permutation_oracle as oracle

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Generator, Tensor

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.permutation.cases import Case
    from moe_routing.conformance.under_test import BackendUnderTest
    from moe_routing.planning import DispatchPlan

LEFT_OUT: tuple[dict[str, Any], ...] = (
    {"ids": "padding"}, {"ids": "strays"}, {"ids": "none"}, {"capacity": 2},
    {"capacity": 2, "block": 4}, {"capacity": 3, "masked": True, "ids": "other_ranks"},
    {"ids": "padding", "block": 16},
)  # fmt: skip
"""Calls with pairs without a place."""


def _left_out(profile: Profile) -> Iterator[CombineCase]:
    for n, (layout, weights) in enumerate(product(LEFT_OUT, (*FLOATS, ""))):
        for dtype in (FLOATS[n % 3],) if profile == "smoke" else FLOATS:
            yield CombineCase(dtype=dtype, weights=weights, **layout)


@COMBINE.check(2, _left_out)
def pairs_without_a_place_add_nothing(under_test: BackendUnderTest, case: CombineCase) -> None:
    """Dropped pairs, padding and pairs of no expert add nothing, whatever their weights are."""
    call = case.make(under_test.device)
    call.checked(under_test)
    if call.weights is None:
        return
    has_place = torch.tensor(oracle.places(call.plan)).to(under_test.device) >= 0
    for value in (torch.nan, torch.inf, -torch.inf, 1.0):
        weights = torch.where(has_place, call.weights, value).to(call.weights.dtype)
        call.but(weights=weights).checked(under_test, f"with weights of {value} there")


def _unread(profile: Profile) -> Iterator[CombineCase]:
    for n, layout in enumerate(LEFT_OUT):
        for dtype in (FLOATS[n % 3],) if profile == "smoke" else FLOATS:
            yield CombineCase(dtype=dtype, weights="", **layout)
            yield CombineCase(dtype=dtype, **layout)


@COMBINE.check(2, _unread)
def rows_without_a_pair_are_not_read(under_test: BackendUnderTest, case: CombineCase) -> None:
    """Rows at places that no pair has may hold NaN, infinity or large numbers."""
    call = case.make(under_test.device)
    without = oracle.is_empty(call.plan)
    rows = call.matrix.clone()
    for value in (torch.nan, -torch.inf, torch.finfo(rows.dtype).max):
        rows[without.to(under_test.device)] = value
        call.but(rows=rows.view(call.rows.shape)).checked(under_test, f"rows of {value} there")


def _masked(_profile: Profile) -> Iterator[CombineCase]:
    for dtype, flat in product(FLOATS, (False, True)):
        yield CombineCase(dtype=dtype, flat=flat, masked=True, capacity=9)
        yield CombineCase(dtype=dtype, flat=flat, masked=True, capacity=3, memory="sliced")


@COMBINE.check(2, _masked)
def rows_of_a_masked_plan_may_be_one_matrix(
    under_test: BackendUnderTest, case: CombineCase
) -> None:
    """Rows of a masked plan are ``[E, capacity, H]`` or ``[E * capacity, H]``."""
    case.make(under_test.device).checked(under_test)


def _numbers(like: Tensor, generator: Generator, *ends: int) -> Tensor:
    """Return a tensor like another, of random numbers around the ends, and of those of int32."""
    near = [end + by for end in (0, *ends) for by in (-1, 0, 1, 2)]
    far = [-(2**31), 2**31 - 1, 2**30, -(2**20), 2**20, 2**24]
    every = torch.tensor(near + far, dtype=torch.int64)
    which = torch.randint(len(every), like.shape, generator=generator)
    spread = torch.randint(-2 * max(ends), 3 * max(ends) + 1, like.shape, generator=generator)
    either = torch.randint(2, like.shape, generator=generator)
    return torch.where(either == 0, every[which], spread).to(torch.int32)


GARBAGE = ("order", "inverse", "offsets", "counts", "everything", "zeros", "largest", "lowest")
"""What of a plan holds what it should not: a part, all of it, or one number everywhere."""


@dataclass(frozen=True, slots=True)
class Garbage:
    """A call whose plan does not hold one.

    :ivar case: what the call is otherwise.
    :ivar part: one of ``GARBAGE``.
    """

    case: Case
    part: str

    @property
    def id(self) -> str:
        """Name for test ids."""
        return f"{self.part}-{self.case.id}"

    @property
    def family(self) -> str:
        """As of the case."""
        return ""

    def plan(self, plan: DispatchPlan) -> DispatchPlan:
        """Return the plan with other contents."""
        generator = self.case.generator()
        pairs, places = plan.inverse.numel(), plan.order.numel()
        constants = {"zeros": 0, "largest": 2**31 - 1, "lowest": -(2**31)}
        if self.part in constants:
            return plan._replace(
                **{
                    name: torch.full_like(part, constants[self.part])
                    for name, part in plan._asdict().items()
                    if part is not None
                }
            )
        ends = {
            "order": pairs, "inverse": places, "offsets": places, "counts": places,
            "block_experts": len(plan.counts),
        }  # fmt: skip
        names = ends if self.part == "everything" else (self.part,)
        wrong = {
            name: _numbers(part, generator, ends[name])
            for name in names
            if (part := getattr(plan, name)) is not None
        }
        if "inverse" in wrong and self.part == "everything":
            # So that places count at all.
            wrong["offsets"][-1] = places + 1
        return plan._replace(**wrong)


def _garbage(operation: type[Case], profile: Profile) -> Iterator[Garbage]:
    for part in GARBAGE:
        for case in _sets.in_every_form(operation, profile, memory="between_others", topk=3):
            yield Garbage(case.but(ids="random"), part)


@both(5, _garbage)
def plans_of_any_content_touch_nothing_else(under_test: BackendUnderTest, case: Garbage) -> None:
    """Whatever a plan holds, nothing outside of rows and results is read or written."""
    call = case.case.make(under_test.device)
    plan = case.plan(on_device(call.plan, torch.device("cpu")))
    call = call.but(plan=on_device(plan, under_test.device))
    if isinstance(call, CombineCall):
        weights = None if call.weights is None else call.weights.contiguous()
        call = call.but(weights=weights, rows=call.rows.nan_to_num(0.0))
        call.must_match(launched(under_test, call))
        return
    assert isinstance(call, PermuteCall)  # noqa: S101 -- for mypy: there are two operations
    of_tokens = oracle.quantize(call.hidden) if call.quantize else (call.hidden,)
    for name, made, rows in zip(call.names, launched(under_test, call), of_tokens, strict=False):
        _must_be_of_its_column(name, made.reshape(-1, made.shape[-1]), rows)


def _must_be_of_its_column(name: str, made: Tensor, rows: Tensor) -> None:
    """Require that each element is one of its column in ``rows``, 0, or as it was before."""
    columns, step = rows.shape[1], rows.itemsize
    of = [outcomes.as_bytes(some).view(-1, columns, step) for some in (made, rows)]
    found, right = (_numbered(some) for some in of)
    allowed = torch.cat((right, torch.zeros_like(right[:1]), torch.full_like(right[:1], 0)))
    allowed[-1] = _numbered(torch.full((1, columns, step), BEFORE, dtype=torch.uint8))[0]
    strange = (found[:, None] != allowed[None]).all(1)
    where = strange.nonzero()
    require(
        not len(where),
        f"{name}: {len(where)} elements are of no row, the first at {where[:1].tolist()}",
    )


def _numbered(bits: Tensor) -> Tensor:
    """Return the bytes of each element as one number."""
    weight = 256 ** torch.arange(bits.shape[-1])
    return (bits.long() * weight).sum(-1)
