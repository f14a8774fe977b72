"""Clause 0: the spec is true, so that a backend cannot pass by declining."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_routing.conformance import gaps, honest
from moe_routing.conformance.honest import Trial
from moe_routing.conformance.planning import _sets, cases
from moe_routing.conformance.planning._check import check
from moe_routing.conformance.planning.cases import Case

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.under_test import BackendUnderTest
    from moe_routing.planning import PlanKernel

SIZES = ((64, 8), (1, 1), (3, 2), (60, 6), (256, 8), (512, 10), (1024, 22), (4096, 64))
"""E and K."""


@dataclass(frozen=True, slots=True)
class Problems:
    """A layout and a policy, to be asked about in every size and with either dtype of ids."""

    form: int
    profile: Profile

    @property
    def id(self) -> str:
        """Name for test ids."""
        words = [f"{name}_{value}" for name, value in _sets.FORMS[self.form].items()]
        return "-".join(words) or "sorted"

    @property
    def family(self) -> str:
        """A plan depends on no routing family."""
        return ""

    def __iter__(self) -> Iterator[Case]:
        """Yield cases of few tokens."""
        for experts, topk in SIZES[: 1 if self.profile == "smoke" else len(SIZES)]:
            for dtype in ("int32", "int64"):
                yield Case(
                    num_tokens=9, topk=topk, num_experts=experts, ids_dtype=dtype,
                    **_sets.FORMS[self.form],
                )  # fmt: skip


def every_form(profile: Profile) -> list[Problems]:
    """Return every layout and policy."""
    return [Problems(form, profile) for form in range(len(_sets.FORMS))]


def _trials(under_test: BackendUnderTest, problems: Problems) -> Iterator[Trial]:
    for case in problems:
        yield _trial(under_test, case)


def _trial(under_test: BackendUnderTest, case: Case) -> Trial:
    few, more = (some.make(under_test.device) for some in (case, case.but(num_tokens=129)))

    def launched(kernel: PlanKernel) -> None:
        out = cases.outputs(more)
        kernel(more.ids, out, capacity=more.capacity, weights=more.weights)
        cases.must_match(more, out)

    return Trial(few.problem, lambda: cases.checked(under_test, few, str(few.problem)), launched)


@check(0, every_form)
def what_it_accepts_it_plans(under_test: BackendUnderTest, case: Problems) -> None:
    """Every problem that the backend accepts can be built and planned."""
    honest.must_serve_what_it_accepts(under_test, _trials(under_test, case))


@check(0, every_form)
def what_it_declines_cannot_be_planned(under_test: BackendUnderTest, case: Problems) -> None:
    """What the backend declines, built all the same, fails or is wrong, or its spec says why."""
    honest.must_fail_at_what_it_declines(under_test, _trials(under_test, case))


@check(0, gaps.every_gap)
def a_declared_gap_is_real(under_test: BackendUnderTest, case: gaps.Gap) -> None:
    """What the spec declares a gap in is declined, or tried and found to fail."""
    gaps.must_be_real(under_test, case)
