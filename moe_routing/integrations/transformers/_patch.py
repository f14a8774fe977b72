"""``patch``, ``unpatch`` and ``patched``: a loaded model's routers, replaced in place."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING

from torch import nn

from moe_routing import MoeRoutingWarning, RoutingSpec, explain, get_router
from moe_routing.integrations.transformers._fingerprint import RefusedError
from moe_routing.integrations.transformers._proof import known, recipe_of
from moe_routing.integrations.transformers._recipes import RECIPES, Recipe
from moe_routing.integrations.transformers._report import Layer, PatchReport
from moe_routing.models import NOT_EXPRESSED

if TYPE_CHECKING:
    from collections.abc import Iterator

_OURS = "moe_routing_spec"
"""Attribute of the methods that we put into routers."""
_METHODS = {recipe.method for recipe in RECIPES.values()}


def patch(model: nn.Module) -> PatchReport:
    """Replace the routing of a model's mixture-of-experts layers in place; parameters and state dict stay as they are.

    Each router gets a method of its own in place of its class's: the model's own logits, routed through
    ``moe_routing``, returned in the form that the layer expects (dtype of the weights, int64 ids, what stands first).
    A router is replaced only where its class and the source of its code are proven to be those that we know; the others
    keep their own, with a warning. Patching twice changes nothing.

    :param model: a model of transformers 5.17 or later, or any module that holds such layers; compiled or not.
    :returns: what was replaced by what, and what was left and why.
    :raises TypeError: ``model`` is no module.

    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> sizes = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2}
    >>> model = MixtralForCausalLM(MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    >>> report = patch(model)
    >>> [layer.name for layer in report.replaced], report.layers[0].routing, report.left
    (['model.layers.0.mlp.gate', 'model.layers.1.mlp.gate'], 'ids = topk(l); w = softmax(l[ids])', ())
    >>> unpatch(model)
    """
    _require_module(model)
    report = PatchReport(tuple(_layers(model)))
    if report.left:
        first, *runs = str(report).splitlines()
        text = "\n".join([first, *(run for run in runs if run.startswith("[left]"))])
        warnings.warn(text, MoeRoutingWarning, stacklevel=2)
    return report


def unpatch(model: nn.Module) -> None:
    """Give every router of a model its own code back, without a trace.

    :param model: what ``patch`` was given, or a model that was loaded while ``enable`` was in force.
    """
    _require_module(model)
    for module in model.modules():
        for method in _METHODS:
            if hasattr(vars(module).get(method), _OURS):
                delattr(module, method)


@contextmanager
def patched(model: nn.Module) -> Iterator[PatchReport]:
    """Patch a model inside the block; what was patched before stays so behind it.

    >>> with patched(nn.Linear(1, 1)) as report:
    ...     report.layers
    ()
    """
    _require_module(model)
    before = {id(module) for module in model.modules() if _routing_of(module)}
    try:
        yield patch(model)
    finally:
        for module in model.modules():
            if _routing_of(module) and id(module) not in before:
                unpatch(module)


def install(router: nn.Module) -> tuple[RoutingSpec, Recipe]:
    """Replace the routing of one router, or raise ``RefusedError`` with the reason why not."""
    cls = type(router)
    recipe = recipe_of(cls)
    mine = vars(router).get(recipe.method)
    if mine is not None and not hasattr(mine, _OURS):
        msg = f"its {recipe.method} was replaced before, by {getattr(mine, '__qualname__', mine)}"
        raise RefusedError(msg)
    spec = recipe.spec(router)
    if mine is None:
        method = recipe.replacement(getattr(cls, recipe.method), get_router(spec))
        setattr(method, _OURS, spec)
        setattr(router, recipe.method, MethodType(method, router))
    return spec, recipe


def _require_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        msg = f"model: expected a torch.nn.Module, got {model!r}"
        raise TypeError(msg)


def _routing_of(module: nn.Module) -> RoutingSpec | None:
    """Return the routing that stands in a module, ``None`` where it has its own."""
    found = (getattr(vars(module).get(method), _OURS, None) for method in _METHODS)
    return next((spec for spec in found if spec), None)


def _layers(model: nn.Module) -> Iterator[Layer]:
    names = {path.rpartition(".")[2] for path in known()}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if type(module).__name__ in names:
            yield _layer(name, module, modules.get(name.rpartition(".")[0]))
        elif "experts" in module._modules and not any(type(child).__name__ in names for child in module.children()):  # noqa: SLF001
            model_type = getattr(getattr(model, "config", None), "model_type", "")
            yield Layer(name, _short(module), reason=NOT_EXPRESSED.get(model_type, "no router in it is known here"))


def _layer(name: str, router: nn.Module, parent: nn.Module | None) -> Layer:
    try:
        if parent is not None:
            _require_own_forward(parent)
        spec, recipe = install(router)
    except RefusedError as reason:
        return Layer(name, _short(router), reason=str(reason))
    remark = "" if recipe.in_training else "training keeps its own code"
    return Layer(name, _short(router), spec.formula, _backend(router, recipe, spec), remark)


def _require_own_forward(parent: nn.Module) -> None:
    """Refuse a block whose forward somebody replaced, a fused kernel that routes by itself; accelerate's calls the old one."""
    forward = vars(parent).get("forward")
    if forward is not None and not hasattr(forward, _OURS) and not hasattr(parent, "_old_forward"):
        msg = f"the forward of {_short(parent)} around it was replaced, by {getattr(forward, '__qualname__', forward)}"
        raise RefusedError(msg)


def _backend(router: nn.Module, recipe: Recipe, spec: RoutingSpec) -> str:
    """Ask who would route where the layer's weights are now."""
    weight = next(router.parameters())
    if weight.is_meta:
        return ""
    num_experts: int | None = getattr(router, "num_experts", None)
    report = explain(spec, device=weight.device, num_experts=num_experts, topk=recipe.topk(router), dtype=weight.dtype)
    return report.winner or ""


def _short(module: nn.Module) -> str:
    """Name a class of transformers by its model, ``gemma4.Gemma4TextRouter``; others whole."""
    cls = type(module)
    name = cls.__module__.rpartition(".modeling_")[2]
    return f"{name if cls.__module__.startswith('transformers.') else cls.__module__}.{cls.__qualname__}"
