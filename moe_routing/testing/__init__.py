"""The conformance kit: proves that a backend computes what every other backend computes.

Importing this package imports no torch; the names below import what they need on their first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_routing.testing.admissible import compare
    from moe_routing.testing.conformance import RouterConformance
    from moe_routing.testing.kit import Report, Result, run
    from moe_routing.testing.quick import verify

_HOME = {
    "Report": ("moe_routing.testing.kit", "Report"),
    "Result": ("moe_routing.testing.kit", "Result"),
    "RouterConformance": ("moe_routing.testing.conformance", "RouterConformance"),
    "compare": ("moe_routing.testing.admissible", "compare"),
    "run": ("moe_routing.testing.kit", "run"),
    "verify": ("moe_routing.testing.quick", "verify"),
}

__all__ = ["Report", "Result", "RouterConformance", "compare", "run", "verify"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 -- the TYPE_CHECKING block above holds the types
    """Import a public name on its first use."""
    if name not in _HOME:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    module, attribute = _HOME[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value
