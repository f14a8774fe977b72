"""Reading the values of a launch table; ``ValueError`` names what is wrong with one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

LONGEST_TEXT = 2000
"""Characters of a text in a table: reports show it."""


def text(data: dict[str, Any], name: str) -> str:
    """Return a text of a table."""
    value: str = typed(data, name, str)
    if len(value) > LONGEST_TEXT:
        msg = f"{name}: expected at most {LONGEST_TEXT} characters, got {len(value)}"
        raise ValueError(msg)
    return value


def typed(data: Any, name: str, kind_: type) -> Any:  # noqa: ANN401 -- JSON
    """Return a value of a table, which must be of this type."""
    value = data.get(name) if isinstance(data, dict) else None
    if not isinstance(value, kind_) or isinstance(value, bool):
        msg = f"{name}: expected {kind_.__name__}, got {value!r:.100}"
        raise ValueError(msg)  # noqa: TRY004 -- a file's content, not an argument
    return value


def powers_of_two(numbers: Sequence[Any]) -> bool:
    """Tell whether all are integers, and powers of two."""
    return all(type(n) is int and n > 0 and n & (n - 1) == 0 for n in numbers)
