"""A fingerprint of the code that a class would run."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import textwrap
from functools import cache
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

    :raises RefusedError: the source cannot be read, or a method is not a plain function.
    """
    methods = {name: _undecorated(value) for name, value in vars(cls).items() if isinstance(value, FunctionType)}
    methods.pop("__init__", None)
    trees = {name: _tree(function) for name, function in methods.items()}
    for function, tree in list(zip(methods.values(), trees.values(), strict=True)):
        for node in ast.walk(tree):
            called = function.__globals__.get(node.id) if isinstance(node, ast.Name) else None
            if isinstance(called, FunctionType) and called.__module__ == cls.__module__:
                trees[called.__name__] = _tree(called)
    return digest([base.__name__ for base in cls.__bases__], trees)


def digest(bases: list[str], trees: Mapping[str, ast.AST]) -> str:
    """Hash syntax trees so that every Python gives the same answer, and layout, names of classes and comments none."""
    text = json.dumps([bases, [[name, _plain(trees[name])] for name in sorted(trees)]])
    return hashlib.sha256(text.encode()).hexdigest()[:_LENGTH]


def _undecorated(function: Any) -> FunctionType:  # noqa: ANN401 -- a function, or what a decorator made of one
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
