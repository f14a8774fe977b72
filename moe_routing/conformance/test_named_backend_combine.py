"""What the same collects with ``--moe-operation combine``."""

from __future__ import annotations

from moe_routing.conformance import CombineConformance


class TestNamedBackend(CombineConformance):
    """The backend that ``--moe-backend`` names."""
