"""What the operation ``route`` brings to be measured."""

from __future__ import annotations

from moe_routing.bench._implementation import Operation
from moe_routing.bench.route._check import problems
from moe_routing.bench.route._implementations import backend, comparison, explain
from moe_routing.bench.route._inputs import check_memory, make

__all__ = ["ROUTE"]

ROUTE = Operation(check_memory, explain, make, backend, comparison, problems)
