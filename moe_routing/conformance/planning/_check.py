"""The contract of ``plan``, into which each module here enters its checks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moe_routing.conformance.contract import Contract
from moe_routing.conformance.plan_clauses import CLAUSES
from moe_routing.planning.problem import PLAN_EXAMPLE, PlanProblem

if TYPE_CHECKING:
    from collections.abc import Iterator


def _problems() -> Iterator[PlanProblem]:
    yield PLAN_EXAMPLE
    yield PlanProblem(num_experts=64, topk=8, layout="blocks", block=64)
    yield PlanProblem(num_experts=64, topk=8, layout="masked", drop="last")


def _declinable() -> Iterator[PlanProblem]:
    from moe_routing.conformance.planning.honesty import every_form

    for form in every_form("quick"):
        for case in form:
            yield case.make(torch.device("cpu")).problem


PLAN = Contract(CLAUSES, _problems, declinable=_declinable)
check = PLAN.check
