"""The contract of ``balance``: cases and checks; importing this imports torch."""

from __future__ import annotations

from moe_routing.conformance.balancing import gradients, honesty, memory, repeat, streams, sums
from moe_routing.conformance.balancing._check import BALANCE

__all__ = ["BALANCE", "gradients", "honesty", "memory", "repeat", "streams", "sums"]
