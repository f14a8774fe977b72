"""Clause 0: the spec is true, so that a backend cannot pass by declining."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from moe_routing.conformance import gaps, honest
from moe_routing.conformance.gating import _sets
from moe_routing.conformance.gating._check import check
from moe_routing.conformance.gating.cases import Case
from moe_routing.conformance.gating.repeat import must_be_invariant
from moe_routing.conformance.honest import Trial
from moe_routing.conformance.variants import VARIANTS, fits
from moe_routing.gating import GateOutput, GatesAndRoutes
from moe_routing.gating.problem import FLOATS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.gating.calls import Call
    from moe_routing.conformance.under_test import BackendUnderTest

SIZES = ((64, 8, 300), (128, 8, 2816), (1, 1, 1), (60, 6, 129), (256, 8, 7168), (1024, 10, 64))
"""E, K and H."""


@dataclass(frozen=True, slots=True)
class Problems:
    """One form of call, to be asked about in every size and dtype, and in either order."""

    words: Mapping[str, Any]
    profile: Profile

    @property
    def id(self) -> str:
        """Name for test ids."""
        return Case(**self.words).id

    @property
    def family(self) -> str:
        """Name of the family, for the report's matrix."""
        return Case(**self.words).family

    def __iter__(self) -> Iterator[Case]:
        """Yield cases of few tokens."""
        sizes = SIZES[: 2 if self.profile == "smoke" else len(SIZES)]
        for (experts, topk, columns), dtype in product(sizes, FLOATS):
            for invariant in _sets.ORDERS:
                words = {
                    "num_tokens": 9, "num_experts": experts, "topk": topk, "columns": columns,
                    **self.words, "dtype": dtype, "invariant": invariant,
                }  # fmt: skip
                if fits(VARIANTS[Case(**words).variant], experts, words["topk"]):
                    yield Case(**words)


def every_form(profile: Profile) -> Iterator[Problems]:
    """Yield every form of call, and every family."""
    for form in _sets.FORMS:
        yield Problems(form, profile)
    if profile != "smoke":
        for case in _sets.of_every_variant(profile):
            words = {"variant": case.variant, "topk": case.topk, "ids_dtype": case.ids_dtype}
            yield Problems({**words, "num_experts": 64, "columns": 300}, profile)


def _trials(under_test: BackendUnderTest, problems: Problems) -> Iterator[Trial]:
    for case in problems:
        yield _trial(under_test, case)


def _trial(under_test: BackendUnderTest, case: Case) -> Trial:
    def called() -> None:
        case.make(under_test.device).checked(under_test, str(case.problem))

    def launched(kernel: Any) -> None:  # noqa: ANN401 -- a GateKernel
        more = case.but(num_tokens=129)
        call = more.make(under_test.device)
        right = _launch(kernel, call)
        call.must_match(right)
        if case.invariant:
            must_be_invariant(call, right, lambda some: _launch(kernel, some), more.generator())

    return Trial(case.problem, called, launched)


def _launch(kernel: Any, call: Call) -> GateOutput:  # noqa: ANN401 -- a GateKernel
    """Call a kernel as its protocol says; what it does not route, the oracle's backend does."""
    import moe_routing

    hidden, weight = call.projection[:2]
    shape = (len(hidden), len(weight))
    logits = torch.full(shape, torch.nan, dtype=call.logits_dtype, device=call.device)
    operands: dict[str, Any] = dict(call.operands)
    if isinstance(kernel, GatesAndRoutes):
        made = kernel.routed(call.projection, logits, **operands)
    else:
        kernel(call.projection, logits)
        route = moe_routing.get_router(call.spec, backend="eager")
        made = route(logits, call.topk, ids_dtype=call.ids_dtype, **call.operands)
    return GateOutput(*made, logits)


@check(0, every_form)
def what_it_accepts_it_gates(under_test: BackendUnderTest, case: Problems) -> None:
    """Every problem that the backend accepts can be built and gated."""
    honest.must_serve_what_it_accepts(under_test, _trials(under_test, case))


@check(0, every_form)
def what_it_declines_cannot_be_gated(under_test: BackendUnderTest, case: Problems) -> None:
    """What the backend declines, built all the same, fails or is wrong, or its spec says why."""
    honest.must_fail_at_what_it_declines(under_test, _trials(under_test, case))


@check(0, gaps.every_gap)
def a_declared_gap_is_real(under_test: BackendUnderTest, case: gaps.Gap) -> None:
    """What the spec declares a gap in is declined, or tried and found to fail."""
    gaps.must_be_real(under_test, case)
