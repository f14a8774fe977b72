"""What the same collects with ``--moe-operation gate``."""

from __future__ import annotations

from moe_routing.conformance import GateConformance


class TestNamedBackend(GateConformance):
    """The backend that ``--moe-backend`` names."""
