"""Run the check that must catch a mutant or a change of the product, and look at what it says."""

from __future__ import annotations

import random
import re
from itertools import chain
from typing import TYPE_CHECKING, Any

import pytest

from moe_routing.conformance import drawn
from moe_routing.conformance.contract import contract_of
from moe_routing.conformance.runner import backend_under_test, evaluate

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from moe_routing.conformance.runner import Result
    from mutants._change import Change
    from mutants._mutant import Mutant

TRACED = "compiles_as_one_graph"
"""A check of the clause whose checks compile, in every contract that has one."""


def traced(operation: str) -> set[str]:
    """Return the checks that compile, which takes seconds."""
    checks = contract_of(operation).checks
    clauses = {check.clause for check in checks if check.name == TRACED}
    return {check.name for check in checks if check.clause in clauses}


def results(
    backend: str, operation: str, check: str, profiles: Iterable[str] = ("smoke", "quick")
) -> Iterator[Result]:
    """Run a check on the smallest cases first, and return the results one by one."""
    under_test = backend_under_test(backend, "cpu")
    (found,) = (one for one in contract_of(operation).checks if one.name == check)
    with drawn.seeded(random.getrandbits(32)):
        items = list(chain(*(found.items(profile) for profile in profiles)))  # type: ignore[arg-type] # names of profiles
    for item in items:
        yield evaluate(item, under_test)


def each(wrong: Iterable[Mutant | Change]) -> list[Any]:
    """Return parameters of a test; what compiles is slow."""
    return [
        pytest.param(
            one,
            marks=[pytest.mark.slow] * (one.caught_by in traced(one.operation)),
            id=f"{one.name}-by-{one.caught_by}-{one.operation}",
        )
        for one in wrong
    ]


def must_be_caught(backend: str, wrong: Mutant | Change) -> None:
    """Require that the check that is named for it fails, and says what it must."""
    must_say(wrong.saying, results(backend, wrong.operation, wrong.caught_by))


def must_say(saying: str, found: Iterable[Result]) -> None:
    """Require that a result failed, and says what it must; to crash proves nothing."""
    said = []
    for result in found:
        if result.status == "failed" and "Traceback" not in result.message:
            said.append(result.message)
            if re.search(saying, result.message):
                return  # the other cases cost time, and prove nothing more
    pytest.fail(f"nothing said {saying!r}, but: {said[:5]}")


def must_be_caught_in_eager(change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    """Require that the check fails where the product is changed, on a right backend."""
    right = getattr(change.home, change.function)
    monkeypatch.setattr(change.home, change.function, change.made(right))
    must_be_caught("eager", change)
