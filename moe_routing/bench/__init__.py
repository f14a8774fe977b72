"""Measuring routing: ``moe-routing bench``.

Importing this imports neither torch nor triton nor matplotlib.
"""

from __future__ import annotations

from moe_routing.bench._result import Loss, Result, Row, losses, merged, refuse_another_run
from moe_routing.bench._settings import COMPARISONS, DTYPES, MODES, Case, Settings, best_mode

__all__ = [
    "COMPARISONS",
    "DTYPES",
    "MODES",
    "Case",
    "Loss",
    "Result",
    "Row",
    "Settings",
    "best_mode",
    "losses",
    "merged",
    "refuse_another_run",
]
