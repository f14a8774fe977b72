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


def _declinable() -> Iterator[RoutingProblem]:
    from moe_routing.conformance.checks.honesty import Problems

    for variant in VARIANTS:
        for case, training in Problems(variant, "quick"):
            yield case.problem(training=training)


ROUTE = Contract(CLAUSES, _problems, declinable=_declinable)
check = ROUTE.check
