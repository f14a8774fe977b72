"""A fingerprint of the code that a class would run."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import textwrap
from functools import cache, partial
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_LENGTH = 12
_IGNORED = {"annotation", "returns", "decorator_list", "type_comment", "type_params", "kind"}


class RefusedError(Exception):
    """Why a router keeps its own code."""


def fingerprint(cls: type) -> str:
    """Hash what a class computes: its bases' names, its methods but ``__init__``, and the module's functions they call.

    :raises RefusedError: the source cannot be read.
    """
    methods = {name: undecorated(value) for name, value in vars(cls).items() if isinstance(value, FunctionType)}
    methods.pop("__init__", None)
    trees = {name: _tree(function) for name, function in methods.items()}
    called = list(methods.values())
    for function in called:
        for node in ast.walk(_tree(function)):
            found = function.__globals__.get(node.id) if isinstance(node, ast.Name) else None
            if isinstance(found, FunctionType) and found.__module__ == cls.__module__ and found.__name__ not in trees:
                trees[found.__name__] = _tree(found)
                called.append(found)
    return digest([base.__name__ for base in cls.__bases__], trees)


def require_own_methods(cls: type) -> None:
    """Raise ``RefusedError`` if a method of a class was written in another module than the class, or is no function."""
    for name, value in vars(cls).items():
        is_function = isinstance(value, FunctionType)
        if home_of(undecorated(value)) not in {cls.__module__, ""} if is_function else name == "forward":
            msg = f"the {name} of {cls.__qualname__} was replaced, by {described(value)}; "
            raise RefusedError(msg + "put the class's own back to route it here")


def home_of(function: FunctionType) -> str:
    """Return the module that a function was written in; ``functools.wraps`` cannot change this answer."""
    return str(function.__globals__.get("__name__", ""))


def described(value: object) -> str:
    """Name a callable by where its code is, for a message.

    >>> described(described)
    'moe_routing.integrations.transformers._fingerprint.described'
    """
    while isinstance(value, partial):
        value = value.func
    function = getattr(value, "__func__", value)
    if not isinstance(function, FunctionType):
        return f"{type(value).__module__}.{type(value).__qualname__}" if not isinstance(value, type) else repr(value)
    code = function.__code__
    name = getattr(code, "co_qualname", code.co_name)  # Python 3.10 has the plain name only
    return f"{home_of(function) or code.co_filename}.{name}"


def digest(bases: list[str], trees: Mapping[str, ast.AST]) -> str:
    """Hash syntax trees so that every Python gives the same answer, and layout, names of classes and comments none."""
    text = json.dumps([bases, [[name, _plain(trees[name])] for name in sorted(trees)]])
    return hashlib.sha256(text.encode()).hexdigest()[:_LENGTH]


def undecorated(function: Any) -> FunctionType:  # noqa: ANN401 -- a function, or what a decorator made of one
    """Take off torch's own decorators, such as ``no_grad``; anybody else's are part of what is hashed."""
    while function.__code__.co_filename == torch.utils._contextlib.__file__:  # noqa: SLF001 -- where no_grad's wrapper is
        function = function.__wrapped__
    plain: FunctionType = function
    return plain


@cache
def _tree(function: Callable[..., Any]) -> ast.AST:
    try:
        # By the code object: getsource would look behind a wrapper, and hash what no longer runs.
        source = textwrap.dedent(inspect.getsource(function.__code__))
        return ast.parse(source).body[0]
    except (OSError, SyntaxError, IndexError) as error:
        msg = f"the source of {function.__qualname__} cannot be read: {error}"
        raise RefusedError(msg) from error


def _plain(node: object) -> object:
    """Turn a syntax tree into lists and texts, without what changes nothing."""
    if isinstance(node, ast.AST):
        fields = {name: value for name, value in ast.iter_fields(node) if name not in _IGNORED and value not in (None, [])}
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node, clean=False) is not None:
            fields["body"] = node.body[1:]
        return [type(node).__name__, [[name, _plain(value)] for name, value in sorted(fields.items())]]
    return [_plain(item) for item in node] if isinstance(node, list) else repr(node)
