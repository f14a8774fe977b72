"""The contract of ``exchange``: cases and checks; importing this imports torch.

Every check runs on all ranks of a group at once: those that torchrun started, or this process
alone.
"""

from __future__ import annotations

from moe_routing.conformance.exchange import (
    agreement,
    arguments,
    capacity,
    edges,
    gradients,
    honesty,
    memory,
    repeat,
    streams,
    values,
)
from moe_routing.conformance.exchange._check import EXCHANGE

__all__ = [
    "EXCHANGE", "agreement", "arguments", "capacity", "edges", "gradients", "honesty", "memory",
    "repeat", "streams", "values",
]  # fmt: skip
