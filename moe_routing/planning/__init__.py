"""The operation ``plan``: where each pair of a token and a slot lies when grouped by expert.

``moe_routing.plan`` is what users call. Importing this package imports no torch.
"""

from __future__ import annotations

from moe_routing.planning.kernel import DispatchPlan, PlanKernel, RoutedPlan
from moe_routing.planning.problem import PlanProblem

__all__ = ["DispatchPlan", "PlanKernel", "PlanProblem", "RoutedPlan"]
