"""The checks, a module for each group of clauses; importing this imports torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_routing.conformance.checks import (
    arguments,
    card,
    fields,
    memory,
    operands,
    repeat,
    sizes,
    state,
    streams,
    traced,
    values,
)
from moe_routing.conformance.checks._check import CHECKS, Check, Item, Named

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moe_routing.conformance.cases import Profile

CHECKS.sort(key=lambda check: check.clause)


def items(profile: Profile) -> Iterator[Item]:
    """Yield every check on each of its cases, clause by clause."""
    for check in CHECKS:
        yield from check.items(profile)


def named(name: str) -> Check:
    """Return the check of that name."""
    return next(check for check in CHECKS if check.name == name)


__all__ = [
    "CHECKS", "Check", "Item", "Named",
    "arguments", "card", "fields", "items", "memory", "named", "operands", "repeat",
    "sizes", "state", "streams", "traced", "values",
]  # fmt: skip
