"""The operation ``plan``: where each pair of a token and a slot lies when grouped by expert.

``moe_routing.plan`` is what users call. Importing this package imports neither torch nor the
registry; the names below import what they need on their first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_routing.planning.kernel import DispatchPlan, PlanKernel, RoutedPlan
    from moe_routing.planning.problem import PlanProblem

_HOME = {
    "DispatchPlan": "moe_routing.planning.kernel",
    "PlanKernel": "moe_routing.planning.kernel",
    "PlanProblem": "moe_routing.planning.problem",
    "RoutedPlan": "moe_routing.planning.kernel",
}

__all__ = ["DispatchPlan", "PlanKernel", "PlanProblem", "RoutedPlan"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 -- the TYPE_CHECKING block above holds the types
    """Import a public name on its first use."""
    if name not in _HOME:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value
