"""The contract of the operation ``gate``: its cases and checks; importing this imports torch."""

from __future__ import annotations

from moe_routing.conformance.gating import (
    arguments,
    gradients,
    honesty,
    logits,
    memory,
    plans,
    repeat,
    streams,
    traced,
)
from moe_routing.conformance.gating._check import GATE

__all__ = [
    "GATE", "arguments", "gradients", "honesty", "logits", "memory", "plans", "repeat", "streams",
    "traced",
]  # fmt: skip
