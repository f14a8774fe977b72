"""Who asked for which backend: argument, context manager, environment, or nobody."""

from __future__ import annotations

import numbers
import os
from contextlib import ContextDecorator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

from moe_routing_registry.text import refusal

AskedBy = Literal["argument", "context", "environment", "probe"]

BACKEND_VARIABLE = "MOE_ROUTING_BACKEND"
BLOCK_VARIABLE = "MOE_ROUTING_BLOCK"
STRICT_VARIABLE = "MOE_ROUTING_STRICT"
VERIFY_VARIABLE = "MOE_ROUTING_VERIFY"

preference: ContextVar[str | None] = ContextVar("moe_routing_preference", default=None)
"""The backend that the innermost ``prefer`` block names in this thread or task."""


_outer: ContextVar[tuple[str | None, ...]] = ContextVar("moe_routing_outer_preferences", default=())
"""The values of ``preference`` outside each ``prefer`` block, outermost first.

The blocks are those that this thread or task is in.
"""


class preferring(ContextDecorator):  # noqa: N801 -- used like the functions of contextlib
    """Prefer the backend of that name inside the block, in this thread or task only.

    The object may be used again, inside its own block and in several threads at once: it holds no
    state of a block.
    """

    def __init__(self, name: str) -> None:
        """Keep the name of the backend."""
        self._name = name

    def __enter__(self) -> None:
        """Prefer the backend from here on."""
        _outer.set((*_outer.get(), preference.get()))
        preference.set(self._name)

    def __exit__(self, *_raised: object) -> None:
        """Prefer what was preferred outside the block."""
        *rest, before = _outer.get()
        _outer.set(tuple(rest))
        preference.set(before)


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for, and by whom.

    :ivar backend: the name asked for, or ``None``: the registry chooses.
    :ivar asked_by: ``"argument"``, ``"context"``, ``"environment"``, or ``"probe"`` when nobody
        named one.
    :ivar blocked: names that must not be used.
    :ivar strict: whether a choice below the device's best is an error rather than a warning.
    """

    backend: str | None = None
    asked_by: AskedBy = "probe"
    blocked: frozenset[str] = frozenset()
    strict: bool = False

    @classmethod
    def gather(cls, argument: str | None = None) -> Request:
        """Read argument, context and environment, in this order.

        The first that names a backend wins.

        Raises ``ValueError`` for a value of ``MOE_ROUTING_STRICT`` that is neither yes nor no.
        """
        named: tuple[tuple[str | None, AskedBy], ...] = (
            (argument, "argument"),
            (preference.get(), "context"),
            (os.environ.get(BACKEND_VARIABLE, "").strip() or None, "environment"),
        )
        nobody: tuple[str | None, AskedBy] = (None, "probe")
        backend, asked_by = next((pair for pair in named if pair[0] is not None), nobody)
        block = os.environ.get(BLOCK_VARIABLE, "")
        blocked = frozenset(name.strip() for name in block.split(",") if name.strip())
        return cls(backend, asked_by, blocked, flag(STRICT_VARIABLE))


def flag(variable: str) -> bool:
    """Read a yes/no environment variable.

    ``"0"`` is no, and anything unclear is a ``ValueError``.
    """
    value = os.environ.get(variable, "").strip().lower()
    if value in ("", "0", "false", "no", "off"):
        return False
    if value in ("1", "true", "yes", "on"):
        return True
    raise ValueError(refusal(variable, "1 or 0", value))


def verify_rate(verify: float | bool | None) -> float:  # noqa: FBT001 -- True is what users write
    """Return the share of calls to compare.

    It is the argument's, or the environment's where the argument is ``None``.

    :raises TypeError: the argument is no number.
    :raises ValueError: neither a share from 0 to 1, nor ``MOE_ROUTING_VERIFY`` as ``sample:SHARE``,
        ``1`` or ``0``.

    >>> verify_rate(True), verify_rate(0.25), verify_rate(False)
    (1.0, 0.25, 0.0)
    """
    name, expected = "verify", "True, False or a share from 0 to 1"
    said: Any = verify
    if verify is None:
        name, expected = VERIFY_VARIABLE, "sample:SHARE from 0 to 1, 1 or 0"
        said = os.environ.get(VERIFY_VARIABLE, "").strip() or "0"
    elif not isinstance(said, numbers.Real):  # of NumPy too
        raise TypeError(refusal(name, expected, said))
    try:
        rate = float(said.removeprefix("sample:") if isinstance(said, str) else said)
    except Exception:  # noqa: BLE001 -- a number's own `__float__` may raise anything
        rate = -1.0
    if not 0 <= rate <= 1:
        raise ValueError(refusal(name, expected, said))
    return rate
