"""What the same collects with ``--moe-operation exchange``."""

from __future__ import annotations

from moe_routing.conformance import ExchangeConformance


class TestNamedBackend(ExchangeConformance):
    """The backend that ``--moe-backend`` names."""
