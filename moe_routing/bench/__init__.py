"""Measuring routing and planning: ``moe-routing bench``.

Importing this imports neither torch nor triton nor matplotlib.
"""

from __future__ import annotations

from moe_routing.bench._plan_settings import PLAN_COMPARISONS, PlanCase, PlanSettings
from moe_routing.bench._result import (
    KINDS,
    AnyCase,
    AnySettings,
    Loss,
    Result,
    Row,
    losses,
    merged,
    refuse_another_run,
)
from moe_routing.bench._settings import COMPARISONS, DTYPES, MODES, Case, Settings, best_mode

__all__ = [
    "COMPARISONS",
    "DTYPES",
    "KINDS",
    "MODES",
    "PLAN_COMPARISONS",
    "AnyCase",
    "AnySettings",
    "Case",
    "Loss",
    "PlanCase",
    "PlanSettings",
    "Result",
    "Row",
    "Settings",
    "best_mode",
    "losses",
    "merged",
    "refuse_another_run",
]
