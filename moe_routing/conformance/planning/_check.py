"""The contract of ``plan``, into which each module here enters its checks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_routing.conformance.contract import Contract
from moe_routing.conformance.plan_clauses import CLAUSES
from moe_routing.planning.problem import PLAN_EXAMPLE, PlanProblem

if TYPE_CHECKING:
    from collections.abc import Iterator


def _problems() -> Iterator[PlanProblem]:
    yield PLAN_EXAMPLE
    yield PlanProblem(num_experts=64, topk=8, layout="blocks", block=64)
    yield PlanProblem(num_experts=64, topk=8, layout="masked", drop="last")


PLAN = Contract(CLAUSES, _problems)
check = PLAN.check


def require(condition: object, problem: str) -> None:
    """Raise ``AssertionError``; an ``assert`` statement would vanish under ``python -O``."""
    if not condition:
        raise AssertionError(problem)
