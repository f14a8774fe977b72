"""What the operation ``plan`` brings to be measured."""

from __future__ import annotations

from moe_routing.bench._implementation import Operation
from moe_routing.bench.plan._check import problems
from moe_routing.bench.plan._implementations import backend, comparison, explain
from moe_routing.bench.plan._inputs import check_memory, make

__all__ = ["PLAN"]

PLAN = Operation(check_memory, explain, make, backend, comparison, problems)
