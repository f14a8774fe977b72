"""The contract of ``gate``, into which each module here enters its checks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_routing.conformance.contract import Contract
from moe_routing.conformance.gate_clauses import CLAUSES
from moe_routing.conformance.gating.cases import Case
from moe_routing.gating.example import GATE_EXAMPLE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moe_routing.gating.problem import GateProblem


def _problems() -> Iterator[GateProblem]:
    yield GATE_EXAMPLE
    yield Case(variant="softmax_topk", invariant=False).problem


def _declinable() -> Iterator[GateProblem]:
    from moe_routing.conformance.gating.honesty import every_form

    for form in every_form("quick"):
        for case in form:
            yield case.problem


GATE = Contract(CLAUSES, _problems, declinable=_declinable)
check = GATE.check
