"""Clause 0: the spec is true, so that a backend cannot pass by declining."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_routing._registry import registry
from moe_routing.conformance.planning import _sets, cases
from moe_routing.conformance.planning._check import check, require
from moe_routing.conformance.planning.cases import Case
from moe_routing.conformance.under_test import GAP_OF, NotApplicableError
from moe_routing.probing import probe
from moe_routing_registry.containment import PluginFailure, contained
from moe_routing_registry.errors import FactoryError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.under_test import BackendUnderTest
    from moe_routing_registry import Verdict

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


def _forms(profile: Profile) -> list[Problems]:
    return [Problems(form, profile) for form in range(len(_sets.FORMS))]


def _verdict(under_test: BackendUnderTest, case: Case) -> Verdict | None:
    """Return the backend's rejection of a case, or ``None`` where it accepts.

    What is no capability is a failure.
    """
    problem = case.make(under_test.device).problem
    rejection = under_test.rejection(problem)
    if rejection is None:
        return None
    require(rejection.verdict.code in GAP_OF, f"{problem}: {rejection.verdict.reason}")
    return rejection.verdict


@check(0, _forms)
def what_it_accepts_it_plans(under_test: BackendUnderTest, case: Problems) -> None:
    """Every problem that the backend accepts can be built and planned."""
    accepted = [words for words in case if _verdict(under_test, words) is None]
    if not accepted:
        msg = "the backend declines every problem of this layout and policy"
        raise NotApplicableError(msg)
    for words in accepted:
        call = words.make(under_test.device)
        try:
            with contained("its kernel", AssertionError):
                cases.checked(under_test, call, str(call.problem))
        except PluginFailure as failure:
            msg = f"accepts {call.problem}, but {failure.sentence}"
            raise AssertionError(msg) from failure.error


@check(0, _forms)
def what_it_declines_cannot_be_planned(under_test: BackendUnderTest, case: Problems) -> None:
    """What the backend declines, built all the same, fails or is wrong, or its spec says why."""
    declined: dict[Verdict, list[Case]] = {}
    for words in case:
        if (verdict := _verdict(under_test, words)) is not None:
            declined.setdefault(verdict, []).append(words)
    if not declined:
        msg = "the backend declines nothing of this"
        raise NotApplicableError(msg)
    for verdict, those in declined.items():
        gap = GAP_OF.get(verdict.code) if verdict.code else None
        if gap not in under_test.spec.gaps:
            otherwise = f"accept it, or give a reason under gaps[{gap!r}]"
            _must_be_impossible(under_test, those, verdict.reason, otherwise)


def _must_be_impossible(
    under_test: BackendUnderTest, declined: list[Case], reason: str, otherwise: str
) -> None:
    """Require that some of the cases, which are declined for one reason, cannot be had."""
    said = f"declines {declined[0].make(under_test.device).problem} ({reason})"
    for case in declined:
        kernel = _built_all_the_same(under_test, case)
        if kernel is None:
            can_be_told = registry().builds_unsupported(under_test.backend, "plan")
            untried = "and its factory takes no keyword `unsupported`, so that this cannot be tried"
            require(can_be_told, f"{said}, {untried}; {otherwise}")
            return
        if not _plans_right(under_test, case, kernel):
            return
    require(condition=False, problem=f"{said}, but plans it right; {otherwise}")


def _built_all_the_same(under_test: BackendUnderTest, case: Case) -> Any:  # noqa: ANN401 -- a PlanKernel or None
    """Return what the factory builds for a declined problem, or ``None`` where it raises."""
    problem = case.make(under_test.device).problem
    try:
        return registry().build(
            under_test.backend, problem, probe(under_test.device), unsupported=True
        )
    except FactoryError:
        return None


def _plans_right(under_test: BackendUnderTest, case: Case, kernel: Any) -> bool:  # noqa: ANN401 -- a PlanKernel
    call = case.but(num_tokens=129).make(under_test.device)
    out = cases.outputs(call)
    try:
        with contained("its kernel"):
            kernel(call.ids, out, capacity=call.capacity, weights=call.weights)
            cases.must_match(call, out)
    except PluginFailure:  # whatever a kernel raises on what it declined: it cannot do it
        return False
    return True
