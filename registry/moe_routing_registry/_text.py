"""Text that comes from outside: what may be printed of it, and how a value is named in an error."""

from __future__ import annotations

import re
import unicodedata

_NAME = re.compile(r"[a-z0-9._-]{1,100}")
"""What the names of backends, families, models and score functions are made of."""
_NAME_RULE = "1 to 100 of the characters a-z, 0-9, '.', '_' and '-'"
_MOST = 200
"""Characters of a value that an error shows."""


def require_name(field: str, value: object) -> str:
    """Return a name; raise ``TypeError`` or ``ValueError`` that names the field for what is none.

    >>> require_name("name", "deepseek_v3.2-exp")
    'deepseek_v3.2-exp'
    >>> require_name("name", "<b>")
    Traceback (most recent call last):
    ...
    ValueError: name: expected 1 to 100 of the characters a-z, 0-9, '.', '_' and '-', got '<b>'
    """
    if not isinstance(value, str):
        raise TypeError(refusal(field, "a string", value))
    if _NAME.fullmatch(value) is None:
        raise ValueError(refusal(field, _NAME_RULE, value))
    return value if type(value) is str else str.__str__(value)  # of a subclass, NumPy's for example, the plain string


def printable(text: str) -> str:
    r"""Return the text without what steers a terminal: control characters, bidirectional overrides, lone surrogates.

    Newlines and tabs stay; a space of another width becomes a space.

    >>> printable("red\x1b[31m, bell\x07, \u202etfel")
    'red[31m, bell, tfel'
    """
    if text.isprintable():
        return text
    return "".join(map(_printable, text))


def _printable(c: str) -> str:
    if c.isprintable() or c in "\n\t":
        return c
    return " " if unicodedata.category(c) == "Zs" else ""


def shown(value: object) -> str:
    """Return a value as an error names it: short, in one line, and never the elements of a tensor or an array.

    >>> shown("a" * 300)[-5:], shown(2.5)
    ('a ...', '2.5')
    """
    try:
        shape = getattr(value, "shape", None)
        text = f"a {type(value).__name__} of shape {list(shape)}" if shape else repr(value)
    except Exception:  # noqa: BLE001 -- a plug-in's object may raise anything; the error is about something else
        text = f"a {type(value).__name__}"
    text = " ".join(printable(text).split())
    return text if len(text) <= _MOST else f"{text[: _MOST - 4]} ..."


def refusal(name: str, expected: str, value: object) -> str:
    """Return the sentence that refuses a value: the field, what was expected, and what came.

    >>> refusal("topk", "an int", 2.0)
    'topk: expected an int, got 2.0'
    """
    return f"{name}: expected {expected}, got {shown(value)}"
