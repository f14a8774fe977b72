"""The contracts of ``permute`` and ``combine``: cases and checks; importing this imports torch.

What both operations must do is one check with cases of either.
"""

from __future__ import annotations

from moe_routing.conformance.permutation import (
    arguments,
    gradients,
    honesty,
    memory,
    moved,
    places,
    repeat,
    streams,
    sums,
    traced,
)
from moe_routing.conformance.permutation._check import COMBINE, PERMUTE

__all__ = [
    "COMBINE", "PERMUTE", "arguments", "gradients", "honesty", "memory", "moved", "places",
    "repeat", "streams", "sums", "traced",
]  # fmt: skip
