"""Text that comes from outside: what may be printed of it, and how a value is named in an error."""

from __future__ import annotations

import numbers
import re
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_NAME = re.compile(r"[a-z0-9._-]{1,100}")
"""What the names of backends, families, models and score functions are made of."""
_NAME_RULE = "1 to 100 of the characters a-z, 0-9, '.', '_' and '-'"
MOST_OF_A_LINE = 1000
"""Characters of a plug-in's text that are kept."""
_MOST = 200
"""Characters of a value that an error shows."""
_MOST_BITS = 8 * _MOST
"""Bits of an integer up to which an error shows it; Python prints at most 4,300 digits."""
_FEW = 8
"""Items of a list or tuple up to which an error shows them."""
_PLAIN = (type(None), bool, int, float, str)


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
    # Of a subclass, NumPy's for example, the plain string.
    return value if type(value) is str else str.__str__(value)


def printable(text: str) -> str:
    r"""Return the text without characters that steer a terminal.

    These are control characters, bidirectional overrides and lone surrogates. Newlines and tabs
    stay; a space of another width becomes a space.

    >>> printable("red\x1b[31m, bell\x07, \u202etfel")
    'red[31m, bell, tfel'
    """
    if text.isprintable():
        return text
    return "".join(map(_printable, text))


def line(text: str, most: int = MOST_OF_A_LINE) -> str:
    r"""Return a text from outside as one line of limited length.

    >>> line("one\n two\x07"), line("a" * 9, 8)
    ('one  two', 'aaaa ...')
    """
    text = printable(str.__str__(text)[: 2 * most]).replace("\n", " ")
    return text if len(text) <= most else f"{text[: most - 4]} ..."


def said_by(value: Callable[[], str], instead: str) -> str:
    """Return a text that other code computes, or another one if that raises anything.

    >>> said_by(lambda: str(1 / 0), "(nothing)")
    '(nothing)'
    """
    try:
        return str.__str__(value())
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return instead


def _printable(c: str) -> str:
    if c.isprintable() or c in "\n\t":
        return c
    return " " if unicodedata.category(c) == "Zs" else ""


def shown(value: object) -> str:
    """Return a value as an error names it.

    It is short, in one line, and never has the elements of a tensor or an array.

    >>> shown("a" * 300)[-5:], shown(2.5), shown([1, 2])
    ('a ...', '2.5', '[1, 2]')
    >>> shown([object(), 2])
    'a list of 2 items'
    """
    # A value's own text, shape or length may raise anything; the error that shows it is about
    # something else.
    text = said_by(lambda: _described(value), f"a {type(value).__name__}")
    text = " ".join(printable(text[: 2 * _MOST]).split())
    return text if len(text) <= _MOST else f"{text[: _MOST - 4]} ..."


def _described(value: object) -> str:
    name = type(value).__name__
    shape = getattr(value, "shape", None)
    # A tensor or an array; NumPy's scalars are numbers.
    if isinstance(shape, tuple) and not isinstance(value, numbers.Number):
        known = {"dtype": getattr(value, "dtype", None), "device": getattr(value, "device", None)}
        more = "".join(f", {word} {said}" for word, said in known.items() if said is not None)
        return f"a {name} of shape {list(shape)}{more}"
    if isinstance(value, str):
        return repr(value[: 2 * _MOST])
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        return f"an {name} of {value.bit_length()} bits"
    if isinstance(value, (list, tuple, set, frozenset, dict)):
        plain = (
            len(value) <= _FEW
            and all(type(item) in _PLAIN for item in value)
            and type(value) in (list, tuple)
        )
        return repr(value) if plain else f"a {name} of {len(value)} items"
    return repr(value)


def refusal(name: str, expected: str, value: object) -> str:
    """Return the sentence that refuses a value: the field, what was expected, and what came.

    >>> refusal("topk", "an int", 2.0)
    'topk: expected an int, got 2.0'
    """
    return f"{name}: expected {expected}, got {shown(value)}"
