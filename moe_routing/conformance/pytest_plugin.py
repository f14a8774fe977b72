"""The pytest plug-in: three options, and which backend ``pytest --pyargs moe_routing.conformance`` is about.

Everybody who has this distribution installed loads this file in every run of pytest, so it imports nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--moe-backend``, ``--moe-device`` and ``--moe-full``."""
    group = parser.getgroup("moe-routing", "conformance of a routing backend (moe-routing)")
    group.addoption("--moe-backend", metavar="NAME", help="the backend that moe_routing.conformance checks")
    group.addoption("--moe-device", metavar="DEVICE", help="the device that it is checked on (default: cpu)")
    group.addoption("--moe-full", action="store_true", help="all sizes and dtypes, not a pairwise sample of them")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the kit's own test file alone unless a backend is named."""
    if collection_path.name != "test_named_backend.py" or config.getoption("--moe-backend"):
        return None
    return (
        True if collection_path.parent.name == "conformance" and collection_path.parent.parent.name == "moe_routing" else None
    )
