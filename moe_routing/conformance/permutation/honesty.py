"""Clause 0: the spec is true, so that a backend cannot pass by declining."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_routing.conformance import gaps, honest
from moe_routing.conformance.honest import Trial
from moe_routing.conformance.permutation import _sets, values
from moe_routing.conformance.permutation._check import both
from moe_routing.conformance.permutation.cases import PermuteCase
from moe_routing.conformance.permutation.memory import launched_into_guards
from moe_routing.permutation.problem import FLOATS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.permutation.cases import Case
    from moe_routing.conformance.under_test import BackendUnderTest

TOPK = (8, 1, 2, 6, 10, 22, 64)


@dataclass(frozen=True, slots=True)
class Problems:
    """A layout, and what else is asked for, to be asked about with every K and dtype.

    :ivar operation: the class of the cases.
    :ivar words: what every case has.
    """

    operation: type[Case]
    words: Mapping[str, Any]
    profile: Profile

    @property
    def id(self) -> str:
        """Name for test ids."""
        words = [f"{name}_{value or 'none'}" for name, value in self.words.items()]
        return "-".join(words) or "sorted"

    @property
    def family(self) -> str:
        """Moving and adding rows depends on no routing family."""
        return ""

    def __iter__(self) -> Iterator[Case]:
        """Yield cases of few tokens."""
        moved = self.operation is PermuteCase and not self.words.get("quantize")
        dtypes = values.DTYPES if moved else FLOATS
        smoke = self.profile == "smoke"
        for topk in TOPK[: 1 if smoke else len(TOPK)]:
            for dtype in dtypes[: 3 if smoke else len(dtypes)]:
                rows = "normal" if dtype in FLOATS else "bits"
                yield self.operation(num_tokens=9, topk=topk, dtype=dtype, rows=rows, **self.words)


def every_form(operation: type[Case], profile: Profile) -> Iterator[Problems]:
    """Yield every layout with whatever else can be asked for."""
    options = _sets.PERMUTED if operation is PermuteCase else _sets.COMBINED
    for layout in _sets.LAYOUTS[:3]:
        for option in options:
            yield Problems(operation, {**layout, **option}, profile)


def _trials(under_test: BackendUnderTest, problems: Problems) -> Iterator[Trial]:
    for case in problems:
        yield _trial(under_test, case)


def _trial(under_test: BackendUnderTest, case: Case) -> Trial:
    few, more = (some.make(under_test.device) for some in (case, case.but(num_tokens=129)))
    return Trial(
        few.problem,
        lambda: few.checked(under_test, str(few.problem)),
        lambda kernel: more.must_match(launched_into_guards(kernel, more)),
    )


@both(0, every_form)
def what_it_accepts_works(under_test: BackendUnderTest, case: Problems) -> None:
    """Every problem that the backend accepts can be built and is right."""
    honest.must_serve_what_it_accepts(under_test, _trials(under_test, case))


@both(0, every_form)
def what_it_declines_fails(under_test: BackendUnderTest, case: Problems) -> None:
    """What the backend declines, built all the same, fails or is wrong, or its spec says why."""
    honest.must_fail_at_what_it_declines(under_test, _trials(under_test, case))


@both(0, lambda _operation, profile: gaps.every_gap(profile))
def a_declared_gap_is_real(under_test: BackendUnderTest, case: gaps.Gap) -> None:
    """What the spec declares a gap in is declined, or tried and found to fail."""
    gaps.must_be_real(under_test, case)
