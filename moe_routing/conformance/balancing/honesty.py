"""Clause 0: the spec is true, so that a backend cannot pass by declining."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_routing.conformance import gaps, honest
from moe_routing.conformance.balancing._check import check
from moe_routing.conformance.balancing.cases import DTYPES, KINDS, Case
from moe_routing.conformance.balancing.memory import launched_into_guards
from moe_routing.conformance.honest import Trial

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.under_test import BackendUnderTest

SIZES = ((128, 8), (1, 1), (60, 6), (256, 8), (384, 22), (2048, 8))
"""E and K."""


@dataclass(frozen=True, slots=True)
class Problems:
    """A kind, to be asked about in every size and dtype."""

    id: str
    profile: Profile
    family: str = ""

    def __iter__(self) -> Iterator[Case]:
        """Yield cases of few tokens."""
        for experts, topk in SIZES[: 1 if self.profile == "smoke" else len(SIZES)]:
            for dtype in DTYPES:
                yield Case(
                    kind=self.id, tokens=5, num_experts=experts, topk=topk, dtype=dtype
                )  # fmt: skip


def _every_kind(profile: Profile) -> Iterator[Problems]:
    for kind in KINDS:
        yield Problems(kind, profile)


def _trials(under_test: BackendUnderTest, problems: Problems) -> Iterator[Trial]:
    for case in problems:
        yield _trial(under_test, case)


def _trial(under_test: BackendUnderTest, case: Case) -> Trial:
    few = case.make(under_test.device)

    def launched(kernel: object) -> None:
        more = case.but(tokens=129).make(under_test.device)
        more.must_match(launched_into_guards(kernel, more))

    return Trial(few.problem, lambda: few.checked(under_test, str(few.problem)), launched)


@check(0, _every_kind)
def what_it_accepts_works(under_test: BackendUnderTest, case: Problems) -> None:
    """Every problem that the backend accepts can be built and is right."""
    honest.must_serve_what_it_accepts(under_test, _trials(under_test, case))


@check(0, _every_kind)
def what_it_declines_fails(under_test: BackendUnderTest, case: Problems) -> None:
    """What the backend declines, built all the same, fails or is wrong, or its spec says why."""
    honest.must_fail_at_what_it_declines(under_test, _trials(under_test, case))


@check(0, gaps.every_gap)
def a_declared_gap_is_real(under_test: BackendUnderTest, case: gaps.Gap) -> None:
    """What the spec declares a gap in is declined, or tried and found to fail."""
    gaps.must_be_real(under_test, case)
