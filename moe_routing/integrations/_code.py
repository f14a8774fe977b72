"""What the integrations know functions by: where their code is, and a hash of what it says."""

from __future__ import annotations

import ast
import hashlib
import json
from functools import partial
from types import FunctionType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_LENGTH = 12
_IGNORED = {"annotation", "returns", "decorator_list", "type_comment", "type_params", "kind"}


def digest(bases: list[str], trees: Mapping[str, ast.AST]) -> str:
    """Hash syntax trees so that every version of Python gives the same answer.

    Layout, names of classes and comments do not change it.
    """
    text = json.dumps([bases, [[name, _plain(trees[name])] for name in sorted(trees)]])
    return hashlib.sha256(text.encode()).hexdigest()[:_LENGTH]


def home_of(function: FunctionType) -> str:
    """Return the module that a function was written in.

    ``functools.wraps`` cannot change this answer.
    """
    return str(function.__globals__.get("__name__", ""))


def described(value: object) -> str:
    """Name a callable by where its code is, for a message.

    >>> described(described)
    'moe_routing.integrations._code.described'
    """
    while isinstance(value, partial):
        value = value.func
    function = getattr(value, "__func__", value)
    if not isinstance(function, FunctionType):
        return (
            f"{type(value).__module__}.{type(value).__qualname__}"
            if not isinstance(value, type)
            else repr(value)
        )
    code = function.__code__
    name = getattr(code, "co_qualname", code.co_name)  # Python 3.10 has the plain name only
    return f"{home_of(function) or code.co_filename}.{name}"


def _plain(node: object) -> object:
    """Turn a syntax tree into lists and texts, without what changes nothing."""
    if isinstance(node, ast.AST):
        fields = {
            name: value
            for name, value in ast.iter_fields(node)
            if name not in _IGNORED and value not in (None, [])
        }
        if (
            isinstance(node, (ast.FunctionDef, ast.ClassDef))
            and ast.get_docstring(node, clean=False) is not None
        ):
            fields["body"] = node.body[1:]
        return [
            type(node).__name__,
            [[name, _plain(value)] for name, value in sorted(fields.items())],
        ]
    return [_plain(item) for item in node] if isinstance(node, list) else repr(node)
