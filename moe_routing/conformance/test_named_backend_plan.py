"""What the same collects with ``--moe-operation plan``."""

from __future__ import annotations

from moe_routing.conformance import PlanConformance


class TestNamedBackend(PlanConformance):
    """The backend that ``--moe-backend`` names."""
