"""The contract of the operation ``plan``: its cases and checks; importing this imports torch."""

from __future__ import annotations

from moe_routing.conformance.planning import (
    arguments,
    honesty,
    layouts,
    memory,
    order,
    repeat,
    strays,
    streams,
    traced,
)
from moe_routing.conformance.planning._check import PLAN

__all__ = [
    "PLAN", "arguments", "honesty", "layouts", "memory", "order", "repeat", "strays", "streams",
    "traced",
]  # fmt: skip
