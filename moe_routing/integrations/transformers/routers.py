"""The classes that ``patch`` gives to routers.

Each a subclass of a router class of transformers, made when it is needed.

``MixtralTopKRouter`` of this module is a subclass of transformers' class of that name, and so on
for every router that is supported. pickle finds the classes here by name, in a new process too. See
``docs/decisions/0007-patch-changes-the-class.md``.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moe_routing import Router, get_router
from moe_routing.integrations._code import described
from moe_routing.integrations.transformers._fingerprint import RefusedError
from moe_routing.integrations.transformers._fronts import learn
from moe_routing.integrations.transformers._gates import GATED
from moe_routing.integrations.transformers._loads import LOADS, Counting
from moe_routing.integrations.transformers._proof import known, path_of, recipe_of
from moe_routing.integrations.transformers._tapes import TAPE, Taped
from moe_routing.integrations.transformers._warnings import warn_once

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from moe_routing import RoutingSpec
    from moe_routing.integrations.transformers._recipes import Recipe

STATE = "_moe_routing"
"""Attribute of a patched router that keeps the routing of its latest call."""


class State:
    """The routing of a router's latest call, reused while the settings stay the same.

    :ivar settings: the values of ``Recipe.settings``.
    :ivar route: routes by them.
    """

    def __init__(self, settings: tuple[Any, ...], spec: RoutingSpec) -> None:
        """Get the router of a spec."""
        self.settings = settings
        self.route: Router = get_router(spec)

    def __reduce__(self) -> tuple[Callable[..., State], tuple[Any, ...]]:
        """Copy and pickle the settings and the spec."""
        return State, (self.settings, self.route.spec)


class Made:
    """A class that ``routed`` made.

    :ivar stock: the class of transformers that it derives from.
    :ivar method: name of the method that it overrides.
    :ivar own: the stock class's function, whose code was proven.
    :ivar ours: the function in its place.
    :ivar recipe: how it routes.
    """

    def __init__(self, stock: type[nn.Module], recipe: Recipe) -> None:
        """Make the class."""
        self.stock, self.recipe, self.method = stock, recipe, recipe.method
        self.own: Callable[..., Any] = vars(stock)[recipe.method]
        learn(recipe.front, stock)
        self.ours = self._function()
        names = {
            "__module__": __name__,
            "__doc__": stock.__doc__,
            recipe.method: self.ours,
            STATE: None,
            GATED: None,
            LOADS: None,
            TAPE: None,
        }
        metaclass: Any = type(stock)
        self.cls: type[nn.Module] = metaclass(stock.__name__, (stock,), names)

    def _function(self) -> Callable[..., Any]:
        made, stock, recipe, method, own = self, self.stock, self.recipe, self.method, self.own

        def forward(router: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 -- the block's
            # A bound method that somebody kept may come here after unpatch; and the stock class may
            # be changed after patch.
            if not isinstance(router, made.cls) or getattr(stock, method) is not own:
                return made.stock_instead(router, *args, **kwargs)
            if router.training and not recipe.in_training:
                made.require_no_block(router, "trains by its own code; call eval() on it")
                return own(router, *args, **kwargs)
            state, settings = getattr(router, STATE), recipe.settings.read(router)
            if state is None or state.settings != settings:
                state = made.prepare(router)
            counted, tape = getattr(router, LOADS), getattr(router, TAPE)
            if tape is not None and getattr(router, "_is_replica", False):
                made.require_no_block(router, "is a replica of nn.DataParallel; use DDP or FSDP")
            counting = state.route if counted is None else Counting(state.route, counted)
            route = counting if tape is None else Taped(counting, tape)
            return recipe.forward(router, route, *args, **kwargs)

        for name in (
            "__module__",
            "__name__",
            "__qualname__",
            "__doc__",
        ):  # functools.update_wrapper copies them
            setattr(forward, name, getattr(own, name))
        return forward

    def prepare(self, router: Any) -> State:  # noqa: ANN401 -- a router
        """Get the routing for a router's current settings, and keep it.

        :raises ValueError: they cannot be expressed; names them.
        """
        try:
            spec = self.recipe.spec_of(router)
        except RefusedError as error:
            msg = (
                f"{self.stock.__name__}: {error}; unpatch(model) gives the router its own code back"
            )
            raise ValueError(msg) from error
        state = State(self.recipe.settings.read(router), spec)
        setattr(router, STATE, state)
        return state

    def require_no_block(self, router: Any, what: str) -> None:  # noqa: ANN401 -- a router
        """Raise ``ValueError`` if a block records or replays a router that we do not route."""
        tape = getattr(router, TAPE, None)
        if tape is not None and tape.mode:
            msg = f"model: expected routers that route through moe_routing, got {tape.name}, which "
            raise ValueError(msg + what)

    def stock_instead(self, router: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 -- the block's
        """Run what the stock class has as its method now; warn if that is none of its own."""
        current = getattr(self.stock, self.method)
        self.require_no_block(router, f"runs {described(current)}; patch it again")
        if current is not self.own and not torch.compiler.is_compiling():
            warn_once(
                f"the {self.method} of {self.stock.__name__} was replaced after patch, "
                f"by {described(current)}: its routers run that, not moe_routing; "
                f"put the class's own {self.method} back to route them"
            )
        return current(router, *args, **kwargs)


_MADE: dict[type[nn.Module], Made] = {}
"""What was made, by the class that was made."""
_PLAIN: dict[type[nn.Module], type[nn.Module]] = {}
"""For classes that torch derives at run time (FSDP, parametrizations).

With our class among the bases -> what it replaced.
"""


def routed(stock: type[nn.Module]) -> Made:
    """Return the subclass of a router class that routes through ``moe_routing``.

    The same one while its code is the same.

    :raises RefusedError: the class or its code is not known.
    """
    recipe = recipe_of(stock)
    hashable: Any = stock  # mypy does not take a class of modules for hashable
    return _made(hashable, vars(stock)[recipe.method], recipe)


@cache
def _made(stock: type[nn.Module], _own: Callable[..., Any], recipe: Recipe) -> Made:
    made = Made(stock, recipe)
    _MADE[made.cls] = made
    return made


def made_of(cls: type[nn.Module]) -> Made | None:
    """Return what a class derives from if ``routed`` made that, else ``None``."""
    return next((_MADE[base] for base in cls.__mro__ if base in _MADE), None)


def stock_of(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the router class that a class stands for.

    Below our own, and below those that torch derives at run time.
    """
    made = made_of(cls)
    if made is not None:
        return made.stock
    while path_of(cls) not in known() and cls.__module__.startswith("torch."):
        derived = [base for base in cls.__bases__ if not base.__module__.startswith("torch.")]
        if len(derived) != 1:
            break
        cls = derived[0]
    return cls


def swap(module: nn.Module, old: type[nn.Module], new: type[nn.Module]) -> None:
    """Change a module's class so that ``new`` stands in the place of ``old``."""
    module.__class__ = swapped(type(module), old, new)


def swapped(cls: type[nn.Module], old: type[nn.Module], new: type[nn.Module]) -> type[nn.Module]:
    """Return the class that is ``cls`` with ``new`` in the place of ``old``."""
    if cls is old:
        return new
    before = _PLAIN.get(cls)
    if before is not None and issubclass(before, new) and vars(before).keys() == vars(cls).keys():
        return before
    bases = tuple(
        swapped(base, old, new) if issubclass(base, old) else base for base in cls.__bases__
    )
    names = {
        name: value for name, value in vars(cls).items() if name not in {"__dict__", "__weakref__"}
    }
    metaclass: Any = type(cls)
    made: type[nn.Module] = metaclass(cls.__name__, bases, names)
    _PLAIN[made] = cls
    return made


def _names() -> Mapping[str, str]:
    return {path.rpartition(".")[2]: path for path in known()}


def __getattr__(name: str) -> type[nn.Module]:
    """Return the class of that name.

    :raises ImportError: this transformers has no such router, or one whose code is not known.
    """
    path = _names().get(name)
    if path is None:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    folder = path.partition(".")[0]
    try:
        return routed(
            getattr(import_module(f"transformers.models.{folder}.modeling_{folder}"), name)
        ).cls
    except (ImportError, AttributeError, RefusedError) as error:
        msg = f"{name} cannot route through moe_routing here: {error}"
        raise ImportError(msg) from error


def __dir__() -> list[str]:
    return sorted([*globals(), *_names()])
