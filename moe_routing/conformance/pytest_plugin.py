"""The pytest plug-in: the five options of ``pytest --pyargs moe_routing.conformance``.

``--moe-backend`` names the backend that is checked. Everybody who has this distribution installed
loads this file in every run of pytest, so it imports next to nothing.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


_FILES = {
    "test_named_backend.py": "route",
    "test_named_backend_gate.py": "gate",
    "test_named_backend_plan.py": "plan",
    "test_named_backend_permute.py": "permute",
    "test_named_backend_combine.py": "combine",
    "test_named_backend_balance.py": "balance",
    "test_named_backend_exchange.py": "exchange",
}
"""The kit's own test files, and the operation that each is about."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("moe-routing", "conformance of a routing backend (moe-routing)")
    group.addoption(
        "--moe-backend", metavar="NAME", help="the backend that moe_routing.conformance checks"
    )
    group.addoption(
        "--moe-operation",
        choices=sorted(_FILES.values()),
        default="route",
        help="the operation whose contract it is held to (default: route)",
    )
    group.addoption(
        "--moe-device", metavar="DEVICE", help="the device that it is checked on (default: cpu)"
    )
    group.addoption(
        "--moe-full",
        action="store_true",
        help="all sizes and dtypes, not a pairwise sample of them",
    )
    group.addoption(
        "--moe-seed",
        type=int,
        metavar="N",
        help="draws the cases that are in no list (default: a new one)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Draw the seed unless it is given.

    All processes of pytest-xdist draw the same, from the name that it gives the run.
    """
    if config.option.moe_seed is None:
        run = getattr(config, "workerinput", {}).get("testrunuid")
        numbers = random.SystemRandom() if run is None else random.Random(run)  # noqa: S311 -- not a secret
        config.option.moe_seed = numbers.getrandbits(32)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the kit's own test files alone, but the operation's if a backend is named."""
    operation = _FILES.get(collection_path.name)
    if operation is None or (
        config.getoption("--moe-backend") and config.getoption("--moe-operation") == operation
    ):
        return None
    return (
        True
        if collection_path.parent.name == "conformance"
        and collection_path.parent.parent.name == "moe_routing"
        else None
    )
