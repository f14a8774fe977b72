"""The operation ``gate``: hidden states to the weights and ids of each token's experts.

``Router.gate`` is what users call. Importing this package imports neither torch nor the registry;
the names below import what they need on their first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_routing.gating.call import Gate
    from moe_routing.gating.kernel import (
        GateKernel,
        GateOutput,
        GatesAndPlans,
        GatesAndRoutes,
        Projection,
        RMSNorm,
    )
    from moe_routing.gating.problem import GateProblem

_HOME = {
    "Gate": "moe_routing.gating.call",
    "GateKernel": "moe_routing.gating.kernel",
    "GateOutput": "moe_routing.gating.kernel",
    "GateProblem": "moe_routing.gating.problem",
    "GatesAndPlans": "moe_routing.gating.kernel",
    "GatesAndRoutes": "moe_routing.gating.kernel",
    "Projection": "moe_routing.gating.kernel",
    "RMSNorm": "moe_routing.gating.kernel",
}

__all__ = [
    "Gate", "GateKernel", "GateOutput", "GateProblem", "GatesAndPlans", "GatesAndRoutes",
    "Projection", "RMSNorm",
]  # fmt: skip


def __getattr__(name: str) -> Any:  # noqa: ANN401 -- the TYPE_CHECKING block above holds the types
    """Import a public name on its first use."""
    if name not in _HOME:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value
