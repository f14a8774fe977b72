"""Methods that were set on a module itself, by accelerate's hooks and by anybody else.

``patch`` changes a router's class, so whatever calls the method through the instance routes through
``moe_routing``. A bound method that was taken before does not follow: accelerate keeps one as
``_old_forward``, transformers' parallel layers keep one in a closure. These are bound anew. Any
other override that was there before is left as it is, and so is its router.
"""

from __future__ import annotations

from functools import partial
from types import CellType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any

from moe_routing.integrations._code import described, home_of
from moe_routing.integrations.transformers._fingerprint import RefusedError, undecorated
from moe_routing.integrations.transformers._proof import short

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

    Method = Callable[..., Any]

_ACCELERATE = "accelerate.hooks"
_KEPT = "_old_forward"
"""Attribute in which accelerate keeps the method that its hook calls."""
_DEPTH = 8
"""Wrappers around wrappers that are looked through."""


def require_plain(module: nn.Module, name: str, own: Method) -> None:
    """Raise ``RefusedError`` unless ``rebind`` can change what the module's method calls.

    :param own: the function that the class defines. What may be set on the module is the method
        itself, accelerate's hook, or the wrapper of transformers' parallel layers.
    """
    override = vars(module).get(name)
    if override is None or _is_bound(override, module, own):
        return
    inner = vars(module).get(_KEPT)
    hooked = any(_is_accelerates(value) for value in _called_by(module, override))
    if _is_bound(inner, module, own) if hooked else any(_cells(module, override, own)):
        return
    if hooked:
        msg = (
            f"accelerate's hook calls {described(inner)} in place of its {name}; call "
            "accelerate.hooks.remove_hook_from_module, then patch, then add the hook again"
        )
        raise RefusedError(msg)
    msg = (
        f"its {name} was replaced before, by {described(override)}; take that off, call patch, "
        "then put it back"
    )
    raise RefusedError(msg)


def is_wrapped_by_transformers(module: nn.Module) -> bool:
    """Whether transformers itself set a module's forward, as its parallel layers do."""
    return _home(vars(module).get("forward")).startswith("transformers.")


def reaches(module: nn.Module, name: str, own: Method) -> bool:
    """Whether a call of the module's method is seen to reach the function ``own`` of its class."""
    override = vars(module).get(name)
    return override is None or any(
        _is_bound(value, module, own) for value in _called_by(module, override)
    )


def require_own_forward(block: nn.Module) -> None:
    """Raise ``RefusedError`` if a block runs another forward than its class's.

    A fused kernel that routes is an example. Wrappers of accelerate, torch and transformers pass if
    they are seen to call the block's own.
    """
    for name in ("forward", "__call__"):
        cls = defining(type(block), name)
        function = vars(cls)[name]
        if cls.__module__.startswith("transformers.") and not _home(function).startswith(
            "transformers."
        ):
            msg = f"the {name} of {short(cls)} around it was replaced, by {described(function)}; "
            raise RefusedError(msg + "put the class's own back to route here")
    override = vars(block).get("forward")
    if override is None:
        return
    own: Method = type(block).forward
    known = _KEPT in vars(block) or _home(override).startswith(
        ("accelerate.", "torch.", "transformers.")
    )
    if not (known and reaches(block, "forward", own)):
        home = short(defining(type(block), "forward"))
        msg = (
            f"the forward of {home} around it was replaced, by {described(override)}; "
            "take that off, call patch, then put it back"
        )
        raise RefusedError(msg)


def defining(cls: type, name: str) -> type:
    """Return the class that a class has an attribute from."""
    return next(base for base in cls.__mro__ if name in vars(base))


def _home(value: object) -> str:
    """Return the module of a callable's code, or ``""`` if the callable is no Python function."""
    while isinstance(value, partial):
        value = value.func
    function = getattr(value, "__func__", value)
    return home_of(undecorated(function)) if isinstance(function, FunctionType) else ""


def rebind(module: nn.Module, name: str, old: Method, new: Method) -> None:
    """Bind anew what was bound to the class's ``old`` method.

    Only what ``require_plain`` lets pass can be bound.
    """
    attributes = vars(module)
    for key in (name, _KEPT):
        if _is_bound(attributes.get(key), module, old):
            attributes[key] = MethodType(new, module)
    for cell in _cells(module, attributes.get(name), old):
        cell.cell_contents = MethodType(new, module)
    wrapper = attributes.get(name)
    for _ in range(_DEPTH):
        wrapped = getattr(wrapper, "__dict__", {}).get("__wrapped__")
        if _is_bound(wrapped, module, old):
            wrapper.__wrapped__ = MethodType(new, module)  # type: ignore[union-attr]  # it has a __dict__
        wrapper = wrapped


def _is_bound(value: object, module: nn.Module, function: Method) -> bool:
    return isinstance(value, MethodType) and value.__self__ is module and value.__func__ is function


def _is_accelerates(value: object) -> bool:
    return isinstance(value, partial) and _home(value) == _ACCELERATE


def _called_by(module: nn.Module, value: object) -> list[object]:
    """Return a callable, what it wraps, what that wraps, and so on."""
    found = [value]
    latest = [value]
    for _ in range(_DEPTH):
        latest = [inner for value in latest for inner in _inside(module, value)]
        found += latest
    return found


def _cells(module: nn.Module, value: object, own: Method) -> list[CellType]:
    """Return the closure cells of transformers' own wrappers that hold the module's method."""
    functions = [
        f
        for f in _called_by(module, value)
        if isinstance(f, FunctionType) and _home(f).startswith("transformers.")
    ]
    return [
        cell
        for f in functions
        for cell in f.__closure__ or ()
        if _is_bound(_contents(cell), module, own)
    ]


def _contents(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _inside(module: nn.Module, value: object) -> Iterator[object]:
    """Yield what a wrapper calls, as far as its attributes tell."""
    if _is_accelerates(value):
        yield vars(module).get(_KEPT)
    elif isinstance(value, partial):
        yield value.func
        yield from value.args
    elif isinstance(value, MethodType):
        yield value.__func__
    elif isinstance(value, FunctionType):
        yield getattr(value, "__wrapped__", None)
        yield from map(_contents, value.__closure__ or ())
