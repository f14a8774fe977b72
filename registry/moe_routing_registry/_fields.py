"""Checks of the fields of specs.

Each returns the field as a value of Python's own types, and raises an error that names the field,
what was expected and what came. A spec keeps what it gets from here: the methods of a plug-in's own
subclass of ``str``, ``int`` or ``tuple`` might raise in the middle of somebody's routing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

from moe_routing_registry.text import MOST_OF_A_LINE, refusal, require_name

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_MOST = 2**31 - 1
"""Largest integer of a field."""


def keep(spec: object, **fields: object) -> None:
    """Set fields of a frozen spec that is being made."""
    for name, value in fields.items():
        object.__setattr__(spec, name, value)


def text(name: str, value: object) -> str:
    """Return a string; there are limits to what one field may say."""
    if not isinstance(value, str):
        raise TypeError(refusal(name, "a string", value))
    plain = str.__str__(value)
    if len(plain) > MOST_OF_A_LINE:
        raise ValueError(
            refusal(name, f"at most {MOST_OF_A_LINE} characters", f"{len(plain)} characters")
        )
    return plain


def whole(name: str, value: object) -> int:
    """Return an integer; True is none."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(refusal(name, "an integer", value))
    plain = int.__int__(value)
    if abs(plain) > _MOST:
        raise ValueError(refusal(name, f"an integer from -{_MOST} to {_MOST}", value))
    return plain


def exactly(name: str, value: object, kind: type[T], expected: str) -> T:
    """Return a value of exactly that class: a subclass has methods that nobody has checked."""
    if type(value) is not kind:
        raise TypeError(refusal(name, expected, value))
    return value


def each(
    name: str,
    value: object,
    kind: type[tuple[object, ...] | frozenset[object]],
    expected: str,
    item: Callable[[str, object], T],
) -> list[T]:
    """Return the items of a tuple or frozenset, each as ``item`` returns it."""
    if not isinstance(value, kind):
        raise TypeError(refusal(name, expected, value))
    return [item(name, found) for found in value]


def mapping(name: str, value: object, expected: str) -> dict[object, object]:
    """Return what a mapping of any type holds."""
    if not isinstance(value, Mapping):
        raise TypeError(refusal(name, expected, value))
    return dict(value.items())


def path(name: str, value: object, key: str = "") -> str:
    """Return a dotted path of an attribute (of a key, where the field is a mapping)."""
    expected = f"'package.module:attribute'{f' for {key!r}' if key else ''}"
    if not isinstance(value, str):
        raise TypeError(refusal(name, expected, value))
    if _PATH.fullmatch(value) is None:
        raise ValueError(refusal(name, expected, value))
    return text(name, value)


def paths(name: str, value: object) -> dict[str, str]:
    """Return a mapping of names of operations to dotted paths."""
    found = mapping(name, value, "a mapping of operations to 'package.module:attribute'")
    plain = {require_name(name, operation): where for operation, where in found.items()}
    return {operation: path(name, where, operation) for operation, where in plain.items()}
