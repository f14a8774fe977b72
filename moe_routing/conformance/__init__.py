"""The conformance kit: proves that a backend computes what every other backend computes.

Importing this package imports no torch; the names below import what they need on their first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_routing.conformance.clauses import Clause
    from moe_routing.conformance.contract import Contract
    from moe_routing.conformance.quick import verify
    from moe_routing.conformance.runner import Report, Result, run
    from moe_routing.conformance.suite import (
        BalanceConformance,
        CombineConformance,
        ExchangeConformance,
        GateConformance,
        PermuteConformance,
        PlanConformance,
        RouterConformance,
    )

_HOME = {
    "BalanceConformance": ("moe_routing.conformance.suite", "BalanceConformance"),
    "Clause": ("moe_routing.conformance.clauses", "Clause"),
    "CombineConformance": ("moe_routing.conformance.suite", "CombineConformance"),
    "Contract": ("moe_routing.conformance.contract", "Contract"),
    "ExchangeConformance": ("moe_routing.conformance.suite", "ExchangeConformance"),
    "GateConformance": ("moe_routing.conformance.suite", "GateConformance"),
    "PermuteConformance": ("moe_routing.conformance.suite", "PermuteConformance"),
    "PlanConformance": ("moe_routing.conformance.suite", "PlanConformance"),
    "Report": ("moe_routing.conformance.runner", "Report"),
    "Result": ("moe_routing.conformance.runner", "Result"),
    "RouterConformance": ("moe_routing.conformance.suite", "RouterConformance"),
    "run": ("moe_routing.conformance.runner", "run"),
    "verify": ("moe_routing.conformance.quick", "verify"),
}

__all__ = [
    "BalanceConformance", "Clause", "CombineConformance", "Contract", "ExchangeConformance",
    "GateConformance", "PermuteConformance", "PlanConformance", "Report", "Result",
    "RouterConformance", "run", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:  # noqa: ANN401 -- the TYPE_CHECKING block above holds the types
    """Import a public name on its first use."""
    if name not in _HOME:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    module, attribute = _HOME[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value
