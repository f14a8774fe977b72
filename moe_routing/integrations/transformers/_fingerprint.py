"""A fingerprint of the code that a class would run."""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch

from moe_routing.integrations._code import described, digest, home_of

if TYPE_CHECKING:
    from collections.abc import Callable


class RefusedError(Exception):
    """Why a router keeps its own code."""


def fingerprint(cls: type) -> str:
    """Hash what a class computes.

    Its bases' names, its methods but ``__init__``, and the module's functions they call.

    :raises RefusedError: the source cannot be read.
    """
    methods = {
        name: undecorated(value)
        for name, value in vars(cls).items()
        if isinstance(value, FunctionType)
    }
    methods.pop("__init__", None)
    trees = {name: _tree(function) for name, function in methods.items()}
    called = list(methods.values())
    for function in called:
        for node in ast.walk(_tree(function)):
            found = function.__globals__.get(node.id) if isinstance(node, ast.Name) else None
            if (
                isinstance(found, FunctionType)
                and found.__module__ == cls.__module__
                and found.__name__ not in trees
            ):
                trees[found.__name__] = _tree(found)
                called.append(found)
    return digest([base.__name__ for base in cls.__bases__], trees)


def fingerprint_of_function(function: FunctionType) -> str:
    """Hash what a function computes, without the functions that it calls.

    :raises RefusedError: the source cannot be read.
    """
    return digest([], {function.__name__: _tree(function)})


def require_own_methods(cls: type) -> None:
    """Raise ``RefusedError`` if a method of a class is not the class's own.

    It is not if it was written in another module than the class, or is no function.
    """
    for name, value in vars(cls).items():
        is_function = isinstance(value, FunctionType)
        if (
            home_of(undecorated(value)) not in {cls.__module__, ""}
            if is_function
            else name == "forward"
        ):
            msg = f"the {name} of {cls.__qualname__} was replaced, by {described(value)}; "
            raise RefusedError(msg + "put the class's own back to route it here")


def undecorated(function: Any) -> FunctionType:  # noqa: ANN401 -- a function, or what a decorator made of one
    """Take off torch's own decorators, such as ``no_grad``.

    Anybody else's are part of what is hashed.
    """
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
