"""Clause 0 of operations without families: what a backend accepts works, what it declines does not.

Each operation says what its problems are, and how one is tried.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_routing._registry import registry
from moe_routing.conformance.under_test import GAP_OF, NotApplicableError
from moe_routing.probing import probe
from moe_routing_registry.containment import PluginFailure, contained
from moe_routing_registry.errors import FactoryError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from moe_routing.conformance.under_test import BackendUnderTest
    from moe_routing_registry import Problem, Verdict


@dataclass(frozen=True, slots=True)
class Trial:
    """A problem, and what shows whether a backend solves it: both raise where it does not.

    :ivar called: calls the operation as users do.
    :ivar launched: calls a kernel as its protocol says.
    """

    problem: Problem
    called: Callable[[], object]
    launched: Callable[[Any], object]


def must_serve_what_it_accepts(under_test: BackendUnderTest, trials: Iterable[Trial]) -> None:
    """Require that what the backend accepts is right when it is called.

    :raises NotApplicableError: it accepts nothing.
    """
    accepted = [trial for trial in trials if _verdict(under_test, trial.problem) is None]
    if not accepted:
        msg = "the backend declines every problem of this kind"
        raise NotApplicableError(msg)
    for trial in accepted:
        _must_serve(trial)


def _must_serve(trial: Trial) -> None:
    try:
        with contained("its kernel", AssertionError):
            trial.called()
    except PluginFailure as failure:
        msg = f"accepts {trial.problem}, but {failure.sentence}"
        raise AssertionError(msg) from failure.error


def must_fail_at_what_it_declines(under_test: BackendUnderTest, trials: Iterable[Trial]) -> None:
    """Require that what the backend declines fails when it is built, or that its spec says why.

    :raises NotApplicableError: it declines nothing.
    """
    declined: dict[Verdict, list[Trial]] = {}
    for trial in trials:
        if (verdict := _verdict(under_test, trial.problem)) is not None:
            declined.setdefault(verdict, []).append(trial)
    if not declined:
        msg = "the backend declines nothing of this"
        raise NotApplicableError(msg)
    for verdict, those in declined.items():
        gap = GAP_OF.get(verdict.code) if verdict.code else None
        if gap not in under_test.spec.gaps:
            otherwise = f"accept it, or give a reason under gaps[{gap!r}]"
            _must_be_impossible(under_test, those, verdict.reason, otherwise)


def _verdict(under_test: BackendUnderTest, problem: Problem) -> Verdict | None:
    """Return the backend's rejection, or ``None`` where it accepts.

    :raises AssertionError: it is for something else than a capability.
    """
    rejection = under_test.rejection(problem)
    if rejection is None:
        return None
    if rejection.verdict.code not in GAP_OF:
        msg = f"{problem}: {rejection.verdict.reason}"
        raise AssertionError(msg)
    return rejection.verdict


def _must_be_impossible(
    under_test: BackendUnderTest, declined: list[Trial], reason: str, otherwise: str
) -> None:
    """Require that some of the problems declined for one reason are beyond the backend."""
    said = f"declines {declined[0].problem} ({reason})"
    for trial in declined:
        kernel = _built_all_the_same(under_test, trial.problem)
        if kernel is None:
            if registry().builds_unsupported(under_test.backend, trial.problem.operation):
                return
            untried = "its factory takes no keyword `unsupported`, so that this cannot be tried"
            msg = f"{said}, and {untried}; {otherwise}"
            raise AssertionError(msg)
        if not _is_right(trial, kernel):
            return
    msg = f"{said}, but gets it right; {otherwise}"
    raise AssertionError(msg)


def _is_right(trial: Trial, kernel: Any) -> bool:  # noqa: ANN401 -- each operation has its own type
    try:
        with contained("its kernel"):
            trial.launched(kernel)
    except PluginFailure:  # whatever a kernel raises on what it declined: it cannot do it
        return False
    return True


def _built_all_the_same(under_test: BackendUnderTest, problem: Problem) -> Any:  # noqa: ANN401 -- each operation has its own type
    """Return what the factory builds for a declined problem, or ``None`` where it raises."""
    device = probe(under_test.device)
    try:
        return registry().build(under_test.backend, problem, device, unsupported=True)
    except FactoryError:
        return None
