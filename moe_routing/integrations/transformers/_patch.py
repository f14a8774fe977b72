"""``patch``, ``unpatch`` and ``patched``: a loaded model's routers, replaced in place."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from moe_routing import LoadMonitor, MoeRoutingWarning, RoutingSpec, explain
from moe_routing._check import flag
from moe_routing.integrations._code import described
from moe_routing.integrations.transformers import losses
from moe_routing.integrations.transformers._fingerprint import RefusedError
from moe_routing.integrations.transformers._gates import GATED, problem_of, why_not
from moe_routing.integrations.transformers._loads import LOADS, Counted
from moe_routing.integrations.transformers._proof import known, short
from moe_routing.integrations.transformers._report import (
    ExpertsLayer,
    GateLayer,
    Layer,
    LossLayer,
    PatchReport,
)
from moe_routing.integrations.transformers._selection import BEFORE, deselect, select
from moe_routing.integrations.transformers._tapes import TAPE
from moe_routing.integrations.transformers._wrapping import (
    defining,
    reaches,
    rebind,
    require_own_forward,
    require_plain,
)
from moe_routing.integrations.transformers.routers import STATE, made_of, routed, stock_of, swap
from moe_routing.models import NOT_EXPRESSED
from moe_routing_registry.text import refusal

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from moe_routing.integrations.transformers._recipes import Recipe

_BLOCKS_WITHOUT_EXPERTS = {"DogeCDMoE"}
"""Blocks of transformers that hold no submodule ``experts``, and no router that is known."""


def patch(
    model: nn.Module,
    *,
    experts: bool = False,
    gate: bool = False,
    loss: bool = False,
    loads: LoadMonitor | None = None,
) -> PatchReport:
    """Replace the routing of a model's mixture-of-experts layers in place.

    Parameters and state dict stay as they are.

    Each router's class becomes a subclass of ``moe_routing.integrations.transformers.routers``,
    which computes the model's own logits, routes them through ``moe_routing``, and returns what the
    layer expects (dtype of the weights, int64 ids, order of the items). A router is replaced only
    if its class and the source of its code are known; the others keep their own code, with a
    warning. Patching twice changes nothing.

    :param model: a model of transformers 5.17 or later, or any module that holds such layers;
        compiled or not.
    :param experts: also select the experts implementation ``"moe_routing"``. The name is in the
        configuration that the model's layers share, as if ``set_experts_implementation`` had been
        called.
    :param gate: also compute the logits, by ``Router.gate`` in the dtype in which the router has
        them, where they are a linear layer or a norm, a scale and a linear layer. Its operands are
        read from the router at each call. ``False`` leaves routers that gate as they are.
    :param loss: also compute the load balancing loss, where the model's forward does for
        ``output_router_logits``: the same number, with no tensor of scores kept for each layer.
        ``False`` leaves a loss that was replaced as it is.
    :param loads: a ``moe_routing.LoadMonitor`` into which the routers that are replaced count,
        under their names in the model. ``None`` leaves routers that count as they are.
    :returns: what was replaced by what, and what was left and why.
    :raises TypeError: ``model`` is no module, a switch is no bool, or ``loads`` no monitor.
    :raises ValueError: ``loads`` has counts of another number of experts for a layer.

    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> sizes = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2}
    >>> heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    >>> model = MixtralForCausalLM(MixtralConfig(**sizes, **heads))
    >>> report = patch(model)
    >>> [layer.name for layer in report.replaced], report.left
    (['model.layers.0.mlp.gate', 'model.layers.1.mlp.gate'], ())
    >>> report.layers[0].routing
    'ids = topk(l); w = softmax(l[ids])'
    >>> unpatch(model)
    """
    _require_module(model)
    experts, gate, loss = flag("experts", experts), flag("gate", gate), flag("loss", loss)
    _require_monitor(loads)
    plain = [module for module in model.modules() if made_of(type(module)) is None]
    layers = tuple(_layers(model))
    if loads is not None:
        routers = {
            layer.name: model.get_submodule(layer.name) for layer in layers if layer.replaced
        }
        try:
            for name, router in routers.items():
                _make_counts(router, name, loads)
        except ValueError:
            for module in plain:
                _remove(module)
            raise
        for name, router in routers.items():
            vars(router)[LOADS] = Counted(loads, name)
    report = PatchReport(
        layers,
        select(model) if experts else (),
        tuple(_gated(model, layer) for layer in layers) if gate else (),
        losses.replace(model) if loss else (),
    )
    parts: tuple[ExpertsLayer | GateLayer | LossLayer, ...] = (
        *report.experts,
        *report.gates,
        *report.losses,
    )
    if report.left or any(part.reason for part in parts):
        lines = str(report).splitlines()
        text = "\n".join(line for line in lines if not line.startswith("[replaced]"))
        warnings.warn(text, MoeRoutingWarning, stacklevel=2)
    return report


def unpatch(model: nn.Module) -> None:
    """Give every router of a model its own class back; hooks and wrappers that others set stay.

    An experts implementation that ``patch`` selected is exchanged for the one before, and a loss
    that it replaced is the model's own again.

    :param model: what ``patch`` was given, or a model that was loaded after ``enable``.
    :raises TypeError: ``model`` is no module.
    :raises ValueError: ``model`` is in a block of ``recording`` or ``replaying``.
    """
    _require_module(model)
    for module in model.modules():
        _require_no_block(module)
    for module in model.modules():
        _remove(module)
        losses.restore(module)
        deselect(module)


@contextmanager
def patched(
    model: nn.Module,
    *,
    experts: bool = False,
    gate: bool = False,
    loss: bool = False,
    loads: LoadMonitor | None = None,
) -> Iterator[PatchReport]:
    """Patch a model inside the block; what was patched before stays so after it.

    Blocks of ``recording`` and ``replaying`` in it must end before it does, or it ends with a
    ``ValueError`` and the model stays patched.

    :param experts: as for ``patch``, like ``gate``, ``loss`` and ``loads``.

    >>> with patched(nn.Linear(1, 1)) as report:
    ...     report.layers
    ()
    """
    _require_module(model)
    before = {id(module) for module in model.modules() if made_of(type(module))}
    gated = {id(module) for module in model.modules() if GATED in vars(module)}
    counted = {
        id(module): vars(module)[LOADS] for module in model.modules() if LOADS in vars(module)
    }
    selected = {id(module) for module in model.modules() if BEFORE in vars(module)}
    balanced = {id(module) for module in model.modules() if losses.is_replaced(module)}
    try:
        yield patch(model, experts=experts, gate=gate, loss=loss, loads=loads)
    finally:
        for module in model.modules():
            if id(module) not in before:
                _remove(module)
            if id(module) not in gated:
                vars(module).pop(GATED, None)
            vars(module).pop(LOADS, None)
            if id(module) in counted:
                vars(module)[LOADS] = counted[id(module)]
            if id(module) not in selected:
                deselect(module)
            if id(module) not in balanced:
                losses.restore(module)


def install(router: nn.Module) -> tuple[RoutingSpec, Recipe]:
    """Replace the routing of one router, or raise ``RefusedError`` with the reason why not."""
    before = made_of(type(router))
    stock = stock_of(type(router))
    made = routed(stock)
    current = vars(made.cls)[made.method]
    if current is not made.ours:
        msg = (
            f"the {made.method} of moe_routing's class was replaced, by {described(current)}; put "
            "the class's own back"
        )
        raise RefusedError(msg)
    if before is None:
        require_plain(router, made.method, made.own)
    elif not reaches(router, made.method, before.ours):
        msg = (
            f"its {made.method} was replaced after patch, by "
            f"{described(vars(router)[made.method])}, which does not call it"
        )
        raise RefusedError(msg)
    if made.method != "forward":  # the router is its own block
        require_own_forward(router)
    made.recipe.prove(router)
    spec = made.recipe.spec_of(router)
    if before is not made:
        asked = {name: value for name, value in vars(router).items() if name in {GATED, LOADS}}
        _remove(router)
        swap(router, stock, made.cls)
        rebind(router, made.method, made.own, made.ours)
        vars(router).update(asked)
    made.prepare(router)
    return spec, made.recipe


def _remove(module: nn.Module) -> None:
    """Give a module its own class back if it is a router that was replaced."""
    made = made_of(type(module))
    if made is None:
        return
    _require_no_block(module)
    wrapper = vars(made.cls)[made.method]
    if wrapper is not made.ours:
        text = (
            f"{described(wrapper)} replaced the {made.method} of moe_routing's class, that "
            f"{short(made.stock)} no longer has"
        )
        warnings.warn(text, MoeRoutingWarning, stacklevel=3)
    swap(module, made.cls, made.stock)
    rebind(module, made.method, made.ours, made.own)
    for name in (STATE, GATED, LOADS, TAPE):
        vars(module).pop(name, None)


def _require_monitor(loads: object) -> None:
    if loads is not None and not isinstance(loads, LoadMonitor):
        raise TypeError(refusal("loads", "a moe_routing.LoadMonitor, or None", loads))


def _require_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(refusal("model", "a torch.nn.Module", model))


def _require_no_block(module: nn.Module) -> None:
    """Raise ``ValueError`` while a router records or replays: its forwards would be missed."""
    tape = vars(module).get(TAPE)
    if tape is not None:
        tape.require_no_block()


def _layers(model: nn.Module) -> Iterator[Layer]:
    modules = dict(model.named_modules())
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    for name, is_router in routed_parts(modules):
        module = modules[name]
        if is_router:
            yield _layer(name, module, _block_of(name, modules))
        else:
            yield Layer(
                name,
                short(stock_of(type(module))),
                reason=NOT_EXPRESSED.get(model_type, "no router in it is known here"),
            )


def routed_parts(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, bool]]:
    """Yield the names of routers, with ``True``, and of blocks without a router that is known."""
    names = {path.rpartition(".")[2] for path in known()}
    routers = {
        id(module)
        for module in modules.values()
        if any(cls.__name__ in names for cls in type(module).__mro__)
    }
    for name, module in modules.items():
        if id(module) in routers:
            yield name, True
        elif _has_experts(module) and not any(id(inner) in routers for inner in module.modules()):
            yield name, False


def _has_experts(module: nn.Module) -> bool:
    return "experts" in module._modules or type(module).__name__ in _BLOCKS_WITHOUT_EXPERTS  # noqa: SLF001 -- cheaper than named_children


def _block_of(name: str, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    """Return the module of transformers that calls a router.

    Wrappers of other libraries may lie between.
    """
    while name:
        name = name.rpartition(".")[0]
        block = modules[name]
        if defining(type(block), "forward").__module__.startswith("transformers."):
            return block
    return None


def _layer(name: str, router: nn.Module, block: nn.Module | None) -> Layer:
    try:
        if block is not None:
            require_own_forward(block)
        spec, recipe = install(router)
    except RefusedError as reason:
        _remove(router)
        return Layer(name, short(stock_of(type(router))), reason=str(reason))
    remark = "" if recipe.in_training else "training keeps its own code"
    return Layer(
        name, short(stock_of(type(router))), spec.formula, _backend(router, recipe, spec), remark
    )


def _backend(router: nn.Module, recipe: Recipe, spec: RoutingSpec) -> str:
    """Return the backend that would route where the layer computes.

    ``""`` if it has no device yet.
    """
    device, weight = _device(router), next(router.parameters(), None)
    if device is None or weight is None:
        return ""
    num_experts: int | None = getattr(router, "num_experts", None)
    report = explain(
        spec, device=device, num_experts=num_experts, topk=recipe.topk(router), dtype=weight.dtype
    )
    return report.winner or ""


def _gated(model: nn.Module, layer: Layer) -> GateLayer:
    """Have ``gate`` compute the logits of a router that was replaced, where it may."""
    if not layer.replaced:
        return GateLayer(layer.name, layer.router, reason="its routing is its own")
    router = model.get_submodule(layer.name)
    made = made_of(type(router))
    assert made is not None  # noqa: S101 -- for mypy
    reason = why_not(made.recipe.front, router)
    vars(router)[GATED] = reason
    device = _device(router)
    backend = ""
    if not reason and device is not None:
        spec, topk = made.recipe.spec_of(router), made.recipe.topk(router)
        problem = problem_of(made.recipe.front, router, spec, topk)
        backend = explain(problem, device=device).winner or ""
    return GateLayer(layer.name, layer.router, backend, reason)


def _make_counts(router: nn.Module, name: str, loads: LoadMonitor) -> None:
    """Make the counts of a router that was replaced, where its number of experts is known.

    Made at its first call, they would lead to a second compilation, or be part of a CUDA graph.
    """
    made = made_of(type(router))
    assert made is not None  # noqa: S101 -- for mypy
    device = _device(router)
    if device is not None and not why_not(made.recipe.front, router):
        spec, topk = made.recipe.spec_of(router), made.recipe.topk(router)
        problem = problem_of(made.recipe.front, router, spec, topk)
        loads.on(name, problem.num_experts, device)


def _device(router: nn.Module) -> torch.device | None:
    """Return where a layer computes, ``None`` if it has no device yet, or no parameter."""
    weight = next(router.parameters(), None)
    if weight is None or weight.is_meta:
        return _hook_device(router)
    return weight.device


def _hook_device(router: nn.Module) -> torch.device | None:
    """Return where accelerate's hooks bring offloaded weights, ``None`` if there are no hooks."""
    hook = getattr(router, "_hf_hook", None)
    devices = [
        getattr(part, "execution_device", None) for part in (hook, *getattr(hook, "hooks", ()))
    ]
    found = next((device for device in devices if device is not None), None)
    return None if found is None else torch.device(found)
