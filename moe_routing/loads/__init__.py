"""How busy each expert of a model's layers is: ``LoadMonitor``, and the ``Loads`` that it reads."""

from __future__ import annotations

from moe_routing.loads._loads import Load, Loads
from moe_routing.loads._monitor import LoadMonitor

__all__ = ["Load", "LoadMonitor", "Loads"]
