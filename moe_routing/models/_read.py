"""Read a model's routing from its configuration."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from moe_routing.models._contradictions import contradictions
from moe_routing.models._preset import ANYTHING_ELSE, SIZES, first, row
from moe_routing.models._table import MODELS, NOT_EXPRESSED
from moe_routing_registry import RoutingSpec, UnknownNameError
from moe_routing_registry.text import refusal, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from moe_routing.models._preset import Changes, ModelPreset, Reads

    Find = Callable[["str | tuple[str, ...]"], tuple[str, object]]
    """Takes the names of one thing; returns the one under which it was found, and its value."""

_MISSING: Final = object()
_NESTED = ("text_config", "thinker_config", "llm_config", "language_config")
"""Parts of a configuration that may have the router, in the order in which they are looked for."""
_BY_LAYER: Final = (
    "expected one value for all layers, got layers that differ; give one layer's, "
    "config.per_layer_config[i]"
)
_INTEGERS = {"num_experts": 1, "topk": 1, "num_groups": 1, "topk_groups": 1, "zero_experts": 0}
"""Fields that are integers, with the smallest that makes sense."""
_ENTRIES = (bool, int, float)
"""Types of what a list may have for each layer."""
_USUAL_SIZES: Reads = {
    "num_experts": ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"),
    "topk": (
        "num_experts_per_tok",
        "num_experts_per_token",
        "moe_topk",
        "moe_top_k",
        "moe_k",
        "top_k_experts",
    ),
}
"""The usual names of E and K, for presets of plug-ins."""


class ConfiguredRouting(NamedTuple):
    """What a configuration says about routing.

    :ivar model: the ``model_type`` that holds the router: ``"gemma4_text"`` for a configuration of
        ``"gemma4"``.
    :ivar spec: the maths.
    :ivar num_experts: E, the columns of the router's logits (zero experts are among them).
    :ivar topk: K.
    """

    model: str
    spec: RoutingSpec
    num_experts: int
    topk: int


def from_config(config: object) -> ConfiguredRouting:
    """Read E, K, groups, scaling, renormalisation and the like from a configuration.

    :param config: an object or dict with a ``model_type``: what ``transformers.AutoConfig``
        returns, or its ``to_dict()``. Of a model with several parts the text model is read
        (``text_config``, ``llm_config``, ``language_config``, or ``thinker_config``'s); pass
        another part, Qwen3-Omni's ``config.talker_config.text_config`` for example, to read that.
        The ``model_type`` of a plug-in's preset is read too (``FamilySpec.models``): its spec as it
        is, E and K by their usual names. DeepSeek-V4's configuration gives the router of its scored
        layers; ``{**config.to_dict(), "model_type": "deepseek_v4_hash"}`` that of its hashed ones.
        Layers that differ (``per_layer_config``) are read one by one, from
        ``config.per_layer_config[i]``.
    :raises UnknownNameError: the ``model_type`` is none of ``MODELS`` and of no plug-in; near
        matches are named.
    :raises ValueError: an attribute that changes the maths is missing or impossible, or says
        something else than the preset computes; or the routing of this model is one that
        ``RoutingSpec`` cannot express.
    :raises TypeError: there is no ``model_type``.

    >>> mixtral = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    >>> routing = from_config(mixtral)
    >>> routing.model, routing.num_experts, routing.topk, routing.spec.formula
    ('mixtral', 8, 2, 'ids = topk(l); w = softmax(l[ids])')
    >>> try:
    ...     from_config({"model_type": "olmoe", "num_experts": 64, "num_experts_per_tok": 8})
    ... except ValueError as error:
    ...     print(str(error).partition(";")[0])
    norm_topk_prob: expected in the configuration of 'olmoe', got none
    """
    model, part = _with_router(config, None)
    if model is None:
        msg = f"config: expected an object or dict with a model_type, got {type(config).__name__}"
        raise TypeError(msg)
    if model in NOT_EXPRESSED:
        msg = f"model_type: the routing of {model!r} cannot be expressed: {NOT_EXPRESSED[model]}"
        raise ValueError(msg)
    if model in MODELS:
        return _read(MODELS[model], part)
    from moe_routing._registry import (
        registry,
    )  # which imports the names of this package's models, to reserve them

    brought = {
        name: spec
        for family in registry().families.values()
        for name, spec in family.models.items()
    }
    if model in brought:
        return _read(_preset_of_plugin(model, brought[model]), part)
    kind = "model_type"
    raise UnknownNameError(kind, model, {**MODELS, **brought})


def _preset_of_plugin(name: str, spec: RoutingSpec) -> ModelPreset:
    """Return a preset that reads E and K only.

    What else a plug-in's configuration says must be what its spec computes.
    """
    [preset] = row(
        name, family="softmax_topk", size=(None, None), reads=_USUAL_SIZES, source="a plug-in"
    )
    return replace(preset, spec=spec)


def _with_router(config: object, model: str | None) -> tuple[str | None, object]:
    """Return the part of the configuration that has the router, and its model type.

    The model type is its parent's where the part has none.
    """
    named = _get(config, "model_type")
    model = named if isinstance(named, str) and named else model
    for name in _NESTED:
        part = _get(config, name)
        if part is not _MISSING and part is not None:
            return _with_router(part, model)
    return model, config


def spec_of(preset: ModelPreset, values: Mapping[str, object]) -> RoutingSpec:
    """Return what a preset computes for a configuration with these values.

    :param values: attribute -> value, for each of ``preset.settings``.
    :raises ValueError: a value is impossible; names its attribute.

    >>> spec_of(MODELS["ernie4_5_moe"], {"moe_norm_min": 0.5}).renorm_floor
    0.5
    """
    fields = [field for field in preset.reads if field not in SIZES]
    said, _ = _said(preset, lambda names: (first(names), values[first(names)]), fields)
    return preset.spec.replace(**said)


def _said(
    preset: ModelPreset, find: Find, fields: Iterable[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the values of these fields and of those that choices fix, and the names they have."""
    said: dict[str, Any] = {}
    for attribute, options in preset.choices.items():
        said.update(_chosen(preset, attribute, options, find(attribute)[1]))
    names: dict[str, str] = {}
    for field in fields:
        if field not in said:
            names[field], value = find(preset.reads[field])
            said[field] = _valued(field, names[field], value)
    return said, names


def _read(preset: ModelPreset, config: object) -> ConfiguredRouting:
    said, names = _said(preset, partial(_find, preset, config), preset.reads)
    num_experts, topk = said.pop("num_experts"), said.pop("topk")
    try:
        spec = preset.spec.replace(**said)
        num_experts += spec.zero_experts
        spec.check_size(num_experts, topk)
    except ValueError as error:
        msg = f"{error}; {_origin(names)}"
        raise ValueError(msg) from error
    _refuse_contradictions(preset, config, spec)
    return ConfiguredRouting(preset.name, spec, num_experts, topk)


def _refuse_contradictions(preset: ModelPreset, config: object, spec: RoutingSpec) -> None:
    read = {*preset.choices}.union(
        *((names,) if isinstance(names, str) else names for names in preset.reads.values())
    )

    def get(name: str) -> object:
        value = _get(config, name)
        return None if value is _MISSING else value

    for name, value, expected in contradictions(spec, read, get):
        msg = (
            f"{name}: expected {expected!r} in a configuration of {preset.name!r}, "
            f"whose preset computes {spec.formula}, got {shown(value)}"
        )
        raise ValueError(msg)


def _find(preset: ModelPreset, config: object, names: str | tuple[str, ...]) -> tuple[str, object]:
    """Return the first of the names that the configuration has, and its value."""
    names = (names,) if isinstance(names, str) else names
    layers = config.get("per_layer_config") if isinstance(config, Mapping) else None
    if isinstance(layers, Mapping):
        for layer in layers.values():
            _refuse_if_said(layer, names)
    for name in names:
        value = _get(config, name)
        if value is not _MISSING:
            return name, value
    for name in names:
        if name in preset.defaults:
            return name, preset.defaults[name]
    msg = f"{' or '.join(names)}: expected in the configuration of {preset.name!r}, got none; "
    raise ValueError(msg + "transformers.AutoConfig fills in defaults")


def _get(config: object, path: str) -> object:
    """Return the attribute or item at a dotted path."""
    try:
        for name in path.split("."):
            config = (
                config.get(name, _MISSING)
                if isinstance(config, Mapping)
                else getattr(config, name, _MISSING)
            )
    except (
        RuntimeError
    ) as error:  # how transformers refuses to give one value for layers that differ
        msg = f"{path}: {_BY_LAYER}"
        raise ValueError(msg) from error
    return config


def _refuse_if_said(layer: object, names: tuple[str, ...]) -> None:
    """Do for a dict what transformers does for an object.

    Never take the value of the whole for that of each layer.
    """
    for name in names:
        if isinstance(layer, Mapping) and name in layer:
            msg = f"{name}: {_BY_LAYER}"
            raise ValueError(msg)


def _chosen(
    preset: ModelPreset, attribute: str, options: Mapping[object, Changes], value: object
) -> Changes:
    for option, changes in options.items():
        if option is ANYTHING_ELSE or option == value:
            return changes
    expected = " or ".join(repr(option) for option in options)
    raise ValueError(refusal(attribute, f"{expected} in a configuration of {preset.name!r}", value))


def _valued(field: str, attribute: str, value: object) -> bool | int | float:
    """Check the type of a value, and return the value.

    A list with an entry for each layer counts as its entry where all are equal.
    """
    if (
        isinstance(value, (list, tuple))
        and value
        and all(type(entry) in _ENTRIES and entry == value[0] for entry in value)
    ):
        value = value[0]
    number = None if isinstance(value, bool) else value
    if field == "renormalize":
        if isinstance(value, bool):
            return value
        expected = "True or False"
    elif field in _INTEGERS:
        if isinstance(number, numbers.Integral) and int(number) >= _INTEGERS[field]:
            return int(number)
        expected = f"an integer >= {_INTEGERS[field]}"
    else:
        with suppress(OverflowError):  # an integer beyond float64
            if isinstance(number, numbers.Real) and math.isfinite(number):
                return float(number)
        expected = "a finite number"
    raise ValueError(refusal(attribute, expected, value))


def _origin(names: Mapping[str, str]) -> str:
    return "read from " + ", ".join(f"{field}={attribute}" for field, attribute in names.items())
