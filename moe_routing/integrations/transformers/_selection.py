"""Which layers' experts ``patch(model, experts=True)`` has computed by ``"moe_routing"``.

transformers asks the configuration that a layer's experts hold for the name of the implementation.
Layers of a model share a configuration, so all of them change, or none.
"""

from __future__ import annotations

from types import FunctionType
from typing import TYPE_CHECKING, Any

from moe_routing.integrations._code import home_of
from moe_routing.integrations.transformers._fingerprint import RefusedError
from moe_routing.integrations.transformers._proof import short
from moe_routing.integrations.transformers._report import ExpertsLayer
from moe_routing.integrations.transformers._wrapping import (
    defining,
    is_wrapped_by_transformers,
    require_plain,
)
from moe_routing.integrations.transformers.routers import stock_of
from moe_routing.permutation.problem import FLOATS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn

NAME = "moe_routing"
BEFORE = "_moe_routing_experts_before"
"""Attribute of a module whose configuration was changed: the implementation that it named."""
_SETTING = "_experts_implementation_internal"
"""The attribute of a configuration that ``set_experts_implementation`` of transformers sets."""
_DECORATOR = "transformers.integrations.moe"
"""Where the decorator is that makes a class ask for an implementation."""
_INTERFACE = "experts_interface"
"""The variable of the decorator's forward that holds the interface."""
_AT_LOADING = "deepgemm_megamoe"
"""An implementation that lays out the weights anew, and so cannot be left."""


def select(model: nn.Module) -> tuple[ExpertsLayer, ...]:
    """Select the implementation for each layer of experts, and say what became of it."""
    found = [(name, module, _reason(module)) for name, module in _found(model)]
    left = {
        id(module.config): name
        for name, module, reason in found
        if reason and hasattr(module, "config")
    }
    chosen, layers = [], []
    for name, module, own_reason in found:
        reason = own_reason
        if not reason and id(module.config) in left:
            reason = f"it shares its configuration with {left[id(module.config)]}, which is left"
        before = ""
        if not reason:
            before = vars(module).get(BEFORE) or _selected(module) or "eager"
            chosen.append(module)
        layers.append(ExpertsLayer(name, short(stock_of(type(module))), before, reason))
    _set([*chosen, *(_models(model) if chosen else ())], left)
    return tuple(layers)


def deselect(module: nn.Module) -> None:
    """Select what was selected before for a module, unless something else was since."""
    if BEFORE in vars(module):
        before = vars(module).pop(BEFORE)
        if _selected(module) == NAME:
            setattr(module.config, _SETTING, before)


def _set(modules: list[Any], left: Mapping[int, str]) -> None:
    before: dict[int, str | None] = {}
    for module in modules:
        if id(module.config) in left:
            continue
        selected = before.setdefault(id(module.config), _selected(module))
        if selected != NAME:
            vars(module)[BEFORE] = selected
            setattr(module.config, _SETTING, NAME)


def _selected(module: Any) -> str | None:  # noqa: ANN401 -- a module of transformers
    selected: str | None = getattr(module.config, _SETTING)
    return selected


def _models(model: nn.Module) -> list[nn.Module]:
    """Return the models of transformers in a module.

    While ``generate`` decodes, it sets a part's implementation by that of the whole.
    """
    return [
        module
        for module in model.modules()
        if hasattr(module, "set_experts_implementation") and hasattr(module.config, _SETTING)
    ]


def _found(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield every module that asks for an implementation, and other children called experts."""
    for name, module in model.named_modules():
        if _interface(module) is not None or (
            name.rpartition(".")[2] == "experts"
            and all(_interface(inner) is None for inner in module.modules())
        ):
            yield name, module


def _interface(module: nn.Module) -> object:
    """Return what the forward of transformers' decorator looks implementations up in."""
    forward = vars(defining(type(module), "forward"))["forward"]
    if not isinstance(forward, FunctionType) or home_of(forward) != _DECORATOR:
        return None
    cells = dict(zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True))
    return cells[_INTERFACE].cell_contents if _INTERFACE in cells else None


def _reason(module: Any) -> str:  # noqa: ANN401 -- a module of transformers
    """Say why experts keep their own code, ``""`` if they need not."""
    try:
        _require_servable(module)
    except RefusedError as reason:
        return str(reason)
    return ""


def _require_servable(module: Any) -> None:  # noqa: ANN401 -- likewise
    interface = _interface(module)
    if interface is None:
        msg = "its class takes no experts implementation"
        raise RefusedError(msg)
    from transformers.integrations import moe

    from moe_routing.integrations.transformers.experts import REFUSAL

    if interface is not moe.ALL_EXPERTS_FUNCTIONS:
        msg = f"its class takes its implementations from {type(interface).__name__}"
        raise RefusedError(msg)
    if REFUSAL:
        raise RefusedError(REFUSAL)
    if _selected(module) == _AT_LOADING:
        msg = f"{_AT_LOADING} cannot be changed after loading"
        raise RefusedError(msg)
    dtype = str(module.down_proj.dtype).removeprefix("torch.")
    if dtype not in FLOATS:
        msg = f"its weights are {dtype}; combine takes {', '.join(FLOATS[:-1])} or {FLOATS[-1]}"
        raise RefusedError(msg)
    # Expert parallelism moves tokens, then calls the class's forward, which asks by name.
    if not is_wrapped_by_transformers(module):
        require_plain(module, "forward", type(module).forward)
