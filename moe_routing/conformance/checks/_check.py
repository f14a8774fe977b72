"""The contract of ``route``, into which each module here enters its checks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_routing.conformance.cases import Case
from moe_routing.conformance.clauses import CLAUSES
from moe_routing.conformance.contract import Contract
from moe_routing.conformance.variants import VARIANTS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moe_routing_registry import RoutingProblem


def _problems() -> Iterator[RoutingProblem]:
    for variant in VARIANTS:
        yield Case(variant=variant, topk=8).problem()


ROUTE = Contract(CLAUSES, _problems)
check = ROUTE.check


def require(condition: object, problem: str) -> None:
    """Raise ``AssertionError``; an ``assert`` statement would vanish under ``python -O``."""
    if not condition:
        raise AssertionError(problem)
