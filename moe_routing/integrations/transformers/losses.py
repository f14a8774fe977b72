"""The classes that ``patch(model, loss=True)`` gives to models: theirs, with our balancing loss.

A model's forward calls ``load_balancing_loss_func`` by a name of its module, that all models of the
module share. So the class of one model becomes a subclass whose forward is the same code with
another name in that place. See ``docs/decisions/0017-a-loss-of-one-model.md``.
"""

from __future__ import annotations

import warnings
from functools import cache
from types import CellType, CodeType, FunctionType
from typing import TYPE_CHECKING, Any

from moe_routing import MoeRoutingWarning
from moe_routing.integrations._code import described, home_of
from moe_routing.integrations.transformers._balance import load_balancing_loss
from moe_routing.integrations.transformers._fingerprint import RefusedError, fingerprint_of_function
from moe_routing.integrations.transformers._proof import short
from moe_routing.integrations.transformers._report import LossLayer
from moe_routing.integrations.transformers._wrapping import defining, rebind, require_plain
from moe_routing.integrations.transformers.routers import swap, swapped

if TYPE_CHECKING:
    from torch import nn

THEIRS = "load_balancing_loss_func"
OURS = "_moe_routing_load_balancing_loss"
"""The name that stands for it, in the module of the forward. Nobody else reads it."""
KNOWN = {"aa20dfc37bd4": "transformers 5.17 to 5.22", "c4d46f41055a": "transformers 5.23, 5.24"}
"""Fingerprints of the function that ours computes the same as."""
OTHERS = {
    "9e39589f0caa": "it sums over pairs of keys",  # Doge, up to 5.22
    "081b6ca69a0c": "it sums over pairs of keys",  # Doge, from 5.23 on
    "fbc245d4947a": "it takes probabilities of one or two experts",  # NLLB
    "ab2244293051": "it takes probabilities and indices",  # Switch Transformers
}
"""Fingerprints of functions of that name that compute something else, and what."""


class _Made:
    """A class that ``_made`` made.

    :ivar stock: the class of transformers that it derives from.
    :ivar own: the stock class's forward.
    :ivar ours: the forward in its place.
    """

    def __init__(self, stock: type[nn.Module], own: FunctionType) -> None:
        self.stock, self.own = stock, own
        self.ours = _with_our_name(_chain(own))
        names = {
            # Where the class is from and what it is called decide how transformers saves a model.
            "__module__": stock.__module__,
            "__qualname__": stock.__qualname__,
            "__doc__": stock.__doc__,
            "forward": self.ours,
            "__reduce_ex__": _reduce,
        }
        metaclass: Any = type(stock)
        self.cls: type[nn.Module] = metaclass(stock.__name__, (stock,), names)


_MADE: dict[type[nn.Module], _Made] = {}
"""What was made, by the class that was made."""


def replace(model: nn.Module) -> tuple[LossLayer, ...]:
    """Replace the loss in every module that computes one, and say what became of it."""
    return tuple(
        LossLayer(name, short(defining(type(module), "forward")), _replaced(module))
        for name, module in model.named_modules()
        if is_replaced(module) or _chain(_forward(defining(type(module), "forward")))
    )


def restore(module: nn.Module) -> None:
    """Give a module its own loss back if it was replaced."""
    made = _made_of(type(module))
    if made is not None:
        swap(module, made.cls, made.stock)
        rebind(module, "forward", made.ours, made.own)


def is_replaced(module: nn.Module) -> bool:
    """Whether a module computes our loss."""
    return _made_of(type(module)) is not None


def _replaced(module: nn.Module) -> str:
    """Replace the loss of a module; return why not, ``""`` if it is replaced."""
    before = _made_of(type(module))
    if before is not None and before.own is _forward(before.stock):
        return ""
    restore(module)  # the forward of its class was replaced since
    stock: Any = defining(type(module), "forward")  # mypy does not take a class for hashable
    own = _forward(stock)
    try:
        _require_known(stock, _chain(own))
        require_plain(module, "forward", own)
    except RefusedError as reason:
        return str(reason)
    made = _made(stock, own)
    swap(module, stock, made.cls)
    rebind(module, "forward", own, made.ours)
    return ""


def _require_known(stock: type[nn.Module], chain: list[FunctionType]) -> None:
    """Raise ``RefusedError`` unless a forward is transformers' and calls the loss that we know."""
    for function in chain:
        if not home_of(function).startswith("transformers."):
            msg = f"the forward of {short(stock)} was replaced, by {described(function)}; "
            raise RefusedError(msg + "put the class's own back to replace its loss")
    for wrapper in chain[:-1]:
        if _cell_of_wrapped(wrapper) is None:
            msg = f"{described(wrapper)} wraps the forward of {short(stock)} in a way not known"
            raise RefusedError(msg)
    theirs = chain[-1].__globals__.get(THEIRS)
    if not isinstance(theirs, FunctionType):
        msg = f"its {THEIRS} is no function but {described(theirs)}"
        raise RefusedError(msg)
    found = fingerprint_of_function(theirs)
    if found in OTHERS:
        msg = f"its {THEIRS} is another: {OTHERS[found]}"
        raise RefusedError(msg)
    if found not in KNOWN:
        msg = (
            f"the code of its {THEIRS} is none that is known (fingerprint {found}): it was "
            "changed, or this transformers is newer"
        )
        raise RefusedError(msg)


@cache
def _made(stock: type[nn.Module], own: FunctionType) -> _Made:
    made = _Made(stock, own)
    _MADE[made.cls] = made
    return made


def _made_of(cls: type[nn.Module]) -> _Made | None:
    return next((_MADE[base] for base in cls.__mro__ if base in _MADE), None)


def _forward(cls: type[nn.Module]) -> Any:  # noqa: ANN401 -- a function, unless somebody replaced it
    return vars(cls)["forward"]


def _chain(function: object) -> list[FunctionType]:
    """Return a forward, what it wraps and so on, to the code that calls the loss.

    Nothing if it calls none.
    """
    found: list[FunctionType] = []
    while isinstance(function, FunctionType):
        found.append(function)
        if THEIRS in function.__code__.co_names:
            return found
        function = vars(function).get("__wrapped__")
    return []


def _with_our_name(chain: list[FunctionType]) -> FunctionType:
    """Copy a forward and its wrappers so that the innermost calls our loss."""
    *wrappers, inner = chain
    inner.__globals__[OURS] = load_balancing_loss
    code = inner.__code__
    names = tuple(OURS if name == THEIRS else name for name in code.co_names)
    made = _copy(inner, code=code.replace(co_names=names))
    for wrapper in reversed(wrappers):
        cells = tuple(
            CellType(made) if cell is _cell_of_wrapped(wrapper) else cell
            for cell in wrapper.__closure__ or ()
        )
        inner, made = made, _copy(wrapper, closure=cells)
        vars(made)["__wrapped__"] = inner  # as functools.wraps does
    return made


def _cell_of_wrapped(wrapper: FunctionType) -> CellType | None:
    """Return the cell of the closure from which a wrapper calls what it wraps."""
    wrapped = vars(wrapper)["__wrapped__"]
    return next((cell for cell in wrapper.__closure__ or () if cell.cell_contents is wrapped), None)


def _copy(
    function: FunctionType,
    *,
    code: CodeType | None = None,
    closure: tuple[CellType, ...] | None = None,
) -> FunctionType:
    """Copy a function with other code, or with another closure."""
    made = FunctionType(
        code or function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        closure or function.__closure__,
    )
    made.__kwdefaults__ = function.__kwdefaults__
    for name in ("__module__", "__qualname__", "__doc__", "__annotations__"):
        setattr(made, name, getattr(function, name))
    vars(made).update(vars(function))
    return made


def _reduce(module: nn.Module, protocol: int) -> tuple[Any, ...]:
    """Copy and pickle a module by the class that transformers has, and replace its loss again."""
    made = _made_of(type(module))
    assert made is not None  # noqa: S101 -- for mypy
    plain = swapped(type(module), made.cls, made.stock)
    return (_blank, (plain,), *object.__reduce_ex__(module, protocol)[2:])


def _blank(cls: type[nn.Module]) -> nn.Module:
    """Make a module without contents, whose loss is replaced where the process knows it."""
    module = cls.__new__(cls)
    reason = _replaced(module)
    if reason:
        text = f"{short(cls)} keeps its own loss: {reason}"
        warnings.warn(text, MoeRoutingWarning, stacklevel=2)
    return module
