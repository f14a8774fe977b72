"""Checks of the fields of specs.

Each raises an error that names the field, what was expected and what came.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from moe_routing_registry.text import refusal, require_name

_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def require(name: str, value: object, kind: type, expected: str, *, of: type = object) -> None:
    """Raise ``TypeError`` unless the value is of that type, and its items of theirs."""
    if not _is(value, kind) or (
        isinstance(value, Iterable) and not all(_is(item, of) for item in value)
    ):
        raise TypeError(refusal(name, expected, value))


def _is(value: object, kind: type) -> bool:
    """Tell whether a value is of the type; True is no integer here."""
    return isinstance(value, kind) and (kind is not int or not isinstance(value, bool))


def require_path(name: str, path: object, key: str = "") -> None:
    """Raise unless the value is the dotted path of an attribute.

    :param key: the key that the value belongs to, where the field is a mapping.
    """
    expected = f"'package.module:attribute'{f' for {key!r}' if key else ''}"
    if not isinstance(path, str):
        raise TypeError(refusal(name, expected, path))
    if _PATH.fullmatch(path) is None:
        raise ValueError(refusal(name, expected, path))


def require_paths(name: str, paths: object) -> None:
    """Raise unless the value maps names of operations to dotted paths."""
    if not isinstance(paths, Mapping):
        raise TypeError(
            refusal(name, "a mapping of operations to 'package.module:attribute'", paths)
        )
    for operation, path in paths.items():
        require_name(name, operation)
        require_path(name, path, operation)
