"""Clause 0: the spec is true, so that a backend cannot pass by declining."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_routing._registry import registry
from moe_routing.conformance import gaps
from moe_routing.conformance.cases import Case
from moe_routing.conformance.checks._check import check
from moe_routing.conformance.requirements import require
from moe_routing.conformance.under_test import (
    GAP_OF,
    BackendUnderTest,
    NotApplicableError,
    must_match,
)
from moe_routing.conformance.variants import VARIANTS, fits
from moe_routing.families import FAMILIES
from moe_routing.probing import probe
from moe_routing_registry.containment import PluginFailure, contained
from moe_routing_registry.errors import FactoryError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moe_routing import Kernel
    from moe_routing.conformance.cases import Profile
    from moe_routing_registry import RoutingProblem, Verdict

SIZES = ((1, 1), (2, 1), (8, 2), (60, 6), (64, 8), (72, 16), (128, 8), (512, 22), (1024, 32))
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Problems:
    """A variant, to be asked about in every size, dtype, layout, and with gradients."""

    variant: str
    profile: Profile

    @property
    def id(self) -> str:
        """Name for test ids."""
        return self.variant.replace("/", ".")

    @property
    def family(self) -> str:
        """Name of the family."""
        return self.variant.partition("/")[0]

    def __iter__(self) -> Iterator[tuple[Case, bool]]:
        """Yield cases of three tokens, and whether gradients are wanted."""
        plain = Case(
            variant=self.variant,
            topk=2 if VARIANTS[self.variant].selection == "sparsemixer" else 8,
            num_tokens=3,
        )
        yield plain, False
        yield plain, True
        yield plain.but(recorded=True, num_tokens=9), False
        yield plain.but(valid="mask", num_tokens=9), False
        if self.profile == "smoke":
            return
        yield plain.but(layout="transposed"), False
        yield plain.but(ids_dtype="int64"), False
        for num_experts, topk in SIZES:
            for dtype in DTYPES:
                if fits(VARIANTS[self.variant], num_experts, topk):
                    yield plain.but(num_experts=num_experts, topk=topk, dtype=dtype), False


def _verdict(under_test: BackendUnderTest, problem: RoutingProblem) -> Verdict | None:
    """Return the backend's rejection of a problem, or ``None`` where it accepts.

    What is no capability is a failure.
    """
    rejection = under_test.rejection(problem)
    if rejection is None:
        return None
    require(rejection.verdict.code in GAP_OF, f"{problem}: {rejection.verdict.reason}")
    return rejection.verdict


def _variants(profile: Profile) -> list[Problems]:
    return [Problems(variant, profile) for variant in VARIANTS]


@check(0, _variants)
def what_it_accepts_it_routes(under_test: BackendUnderTest, case: Problems) -> None:
    """Every problem that the backend accepts can be built and routed."""
    accepted = 0
    for words, training in case:
        problem = words.problem(training=training)
        if _verdict(under_test, problem) is not None:
            continue
        accepted += 1
        call = words.make(under_test.device)
        if training:
            call.logits.requires_grad_()
        try:
            with contained("its kernel"):
                output = under_test.route(call)
        except PluginFailure as failure:
            msg = f"accepts {problem}, but {failure.sentence}"
            raise AssertionError(msg) from failure.error
        must_match(call, output)
    if not accepted:
        msg = "the backend declines every problem of this family"
        raise NotApplicableError(msg)


@dataclass(frozen=True, slots=True)
class TheSpec:
    """The spec as a whole."""

    id: str = "spec"
    family: str = ""


@check(0, lambda _: [TheSpec()])
def it_serves_the_families_that_its_spec_names(
    under_test: BackendUnderTest, _case: TheSpec
) -> None:
    """Every family that the spec names is served in some size.

    A spec that names none serves at least one.
    """
    named = under_test.spec.families
    served = {
        case.family
        for variant in VARIANTS
        for case, training in Problems(variant, "quick")
        if not training and _verdict(under_test, case.problem()) is None
    }
    require(served, "the backend declines every problem of every built-in family")
    missing = sorted(named.intersection(FAMILIES) - served) if named else []
    require(not missing, f"the spec names {', '.join(missing)}, but declines every problem of them")


@check(0, _variants)
def what_it_declines_cannot_be_had(under_test: BackendUnderTest, case: Problems) -> None:
    """What the backend declines, built all the same, fails or is wrong.

    Else the spec must give a reason for the gap.
    """
    declined: dict[Verdict, list[tuple[Case, RoutingProblem]]] = {}
    for words, training in case:
        problem = words.problem(training=training)
        if (verdict := _verdict(under_test, problem)) is not None:
            declined.setdefault(verdict, []).append((words, problem))
    if not declined:
        msg = "the backend declines nothing of this"
        raise NotApplicableError(msg)
    for verdict, problems in declined.items():
        gap = GAP_OF.get(verdict.code) if verdict.code else None
        if gap not in under_test.spec.gaps:
            _must_be_impossible(
                under_test,
                problems,
                verdict.reason,
                f"accept it, or give a reason under gaps[{gap!r}]",
            )


def _must_be_impossible(
    under_test: BackendUnderTest,
    problems: list[tuple[Case, RoutingProblem]],
    reason: str,
    otherwise: str,
) -> None:
    """Require that some of the problems declined for one reason are beyond the backend.

    Not all of them: a sigmoid backend that declines softmax gives the right answer where E is 1.
    """
    said = f"declines {problems[0][1]} ({reason})"
    for words, problem in problems:
        kernel = _built_all_the_same(under_test, problem)
        if kernel is None:
            can_be_told = registry().builds_unsupported(under_test.backend, problem.operation)
            untried = "and its factory takes no keyword `unsupported`, so that this cannot be tried"
            require(can_be_told, f"{said}, {untried}; {otherwise}")
            return
        if not _routes_right(under_test, words, kernel):
            return
    require(condition=False, problem=f"{said}, but routes it right; {otherwise}")


def _built_all_the_same(under_test: BackendUnderTest, problem: RoutingProblem) -> Kernel | None:
    """Return what the factory builds for a declined problem, or ``None`` where it raises."""
    try:
        kernel: Kernel = registry().build(
            under_test.backend, problem, probe(under_test.device), unsupported=True
        )
    except FactoryError:
        return None
    return kernel


def _routes_right(under_test: BackendUnderTest, case: Case, kernel: Kernel) -> bool:
    call = case.but(num_tokens=33).make(under_test.device)  # three rows can be right by chance
    try:
        with contained("its kernel"):
            must_match(call, kernel(call.logits, **call.launched))
    except PluginFailure:  # whatever a kernel raises on what it declined: it cannot do it
        return False
    return True


@check(0, gaps.every_gap)
def a_declared_gap_is_real(under_test: BackendUnderTest, case: gaps.Gap) -> None:
    """What the spec declares a gap in is declined, or tried and found to fail."""
    gaps.must_be_real(under_test, case)
