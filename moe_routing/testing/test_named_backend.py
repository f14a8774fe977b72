"""What ``pytest --pyargs moe_routing.testing --moe-backend NAME`` collects."""

from __future__ import annotations

from moe_routing.testing import RouterConformance


class TestNamedBackend(RouterConformance):
    """The backend that ``--moe-backend`` names."""
