"""What the same collects with ``--moe-operation balance``."""

from __future__ import annotations

from moe_routing.conformance import BalanceConformance


class TestNamedBackend(BalanceConformance):
    """The backend that ``--moe-backend`` names."""
