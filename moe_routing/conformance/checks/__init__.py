"""The checks, a module for each group of clauses; importing this imports torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_routing.conformance.checks import (
    arguments,
    counts,
    fields,
    honesty,
    memory,
    operands,
    repeat,
    replay,
    replicas,
    shared,
    sizes,
    state,
    streams,
    traced,
    values,
)
from moe_routing.conformance.checks._check import ROUTE

if TYPE_CHECKING:
    from moe_routing.conformance.contract import Check


def named(name: str) -> Check:
    """Return the check of that name."""
    return next(check for check in ROUTE.checks if check.name == name)


__all__ = [
    "ROUTE",
    "arguments", "counts", "fields", "honesty", "memory", "named", "operands",
    "repeat", "replay", "replicas", "shared", "sizes", "state", "streams", "traced", "values",
]  # fmt: skip
