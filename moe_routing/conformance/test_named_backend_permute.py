"""What the same collects with ``--moe-operation permute``."""

from __future__ import annotations

from moe_routing.conformance import PermuteConformance


class TestNamedBackend(PermuteConformance):
    """The backend that ``--moe-backend`` names."""
