"""What ``pytest --pyargs moe_routing.conformance --moe-backend NAME`` collects."""

from __future__ import annotations

from moe_routing.conformance import RouterConformance


class TestNamedBackend(RouterConformance):
    """The backend that ``--moe-backend`` names."""
