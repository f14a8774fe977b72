"""``PatchReport``: for each layer what was replaced by what, what was left and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.table import Table

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Layer:
    """What became of one router.

    :ivar name: its name in the model, ``"model.layers.0.router"``.
    :ivar router: its class.
    :ivar routing: the formula that replaces its own, ``""`` where it was left.
    :ivar backend: who computes it where the layer's weights are now; ``""`` where it was left, or
        there is no device yet.
    :ivar reason: why it was left, or a remark.
    """

    name: str
    router: str
    routing: str = ""
    backend: str = ""
    reason: str = ""

    @property
    def replaced(self) -> bool:
        """Whether this layer routes through ``moe_routing``."""
        return bool(self.routing)


@dataclass(frozen=True)
class ExpertsLayer:
    """What became of one layer's experts, where ``patch`` was asked for them.

    :ivar name: their name in the model, ``"model.layers.0.mlp.experts"``.
    :ivar experts: their class.
    :ivar before: the implementation in whose place ``"moe_routing"`` is; ``""`` where they were
        left.
    :ivar reason: why they were left.
    """

    name: str
    experts: str
    before: str = ""
    reason: str = ""

    @property
    def selected(self) -> bool:
        """Whether the implementation ``"moe_routing"`` computes them."""
        return not self.reason


@dataclass(frozen=True)
class GateLayer:
    """What became of one router's logits, where ``patch`` was asked for the gate.

    :ivar name: the router's name in the model, ``"model.layers.0.mlp.gate"``.
    :ivar router: its class.
    :ivar backend: who gates where the layer's weights are now; ``""`` where the router computes its
        own logits, or there is no device yet.
    :ivar reason: why it computes its own logits.
    """

    name: str
    router: str
    backend: str = ""
    reason: str = ""

    @property
    def gated(self) -> bool:
        """Whether ``gate`` computes its logits."""
        return not self.reason


@dataclass(frozen=True)
class LossLayer:
    """What became of one model's load balancing loss, where ``patch`` was asked for it.

    :ivar name: the name of the module that computes it, ``""`` for the whole model.
    :ivar model: its class.
    :ivar reason: why it computes its own.
    """

    name: str
    model: str
    reason: str = ""

    @property
    def replaced(self) -> bool:
        """Whether ``moe_routing`` computes it."""
        return not self.reason


@dataclass(frozen=True)
class PatchReport:
    """What ``patch`` did, layer by layer.

    ``print`` it, show it with rich, or take ``to_dict()`` for programs.

    :ivar layers: every router that was found, in the model's order.
    :ivar experts: all experts that were found, if ``patch`` was asked for them.
    :ivar gates: every router again, if ``patch`` was asked for the gate.
    :ivar losses: every module that computes a load balancing loss, if ``patch`` was asked for it.
    """

    layers: tuple[Layer, ...]
    experts: tuple[ExpertsLayer, ...] = ()
    gates: tuple[GateLayer, ...] = ()
    losses: tuple[LossLayer, ...] = ()

    @property
    def replaced(self) -> tuple[Layer, ...]:
        """The layers that route through ``moe_routing``."""
        return tuple(layer for layer in self.layers if layer.replaced)

    @property
    def left(self) -> tuple[Layer, ...]:
        """The layers that keep their own code."""
        return tuple(layer for layer in self.layers if not layer.replaced)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data.

        It has ``schema_version``, the fields and ``replaced`` of ``layers``, the fields and
        ``selected`` of ``experts``, the fields and ``gated`` of ``gates``, and the fields and
        ``replaced`` of ``losses``.
        """
        layers = [{**asdict(layer), "replaced": layer.replaced} for layer in self.layers]
        experts = [{**asdict(layer), "selected": layer.selected} for layer in self.experts]
        gates = [{**asdict(layer), "gated": layer.gated} for layer in self.gates]
        losses = [{**asdict(loss), "replaced": loss.replaced} for loss in self.losses]
        return {
            "schema_version": SCHEMA_VERSION,
            "layers": layers,
            "experts": experts,
            "gates": gates,
            "losses": losses,
        }

    def __str__(self) -> str:
        """Say it in lines, runs of layers that fared alike in one.

        >>> replaced = Layer("layers.0.mlp", "Gate", "ids = topk(l)")
        >>> left = Layer("layers.1.mlp", "Gate", reason="why")
        >>> print(PatchReport((replaced, left)))
        1 of 2 routers replaced
        [replaced] layers.0.mlp (Gate): ids = topk(l)
        [left] layers.1.mlp (Gate): why
        """
        lines = [f"{len(self.replaced)} of {len(self.layers)} routers replaced"]
        for names, first in self.runs():
            what = " ".join(
                filter(None, (first.routing, first.backend and f"by {first.backend}", first.reason))
            )
            lines.append(
                f"[{'replaced' if first.replaced else 'left'}] {names} ({first.router}): {what}"
            )
        if self.gates:
            gated = sum(layer.gated for layer in self.gates)
            lines.append(f"{gated} of {len(self.gates)} routers' logits computed by gate")
        for names, gate in _runs(self.gates):
            by = " ".join(filter(None, ("gate", gate.backend and f"by {gate.backend}")))
            lines.append(
                f"[{'replaced' if gate.gated else 'left'}] {names} ({gate.router}): "
                f"{by if gate.gated else 'its own logits: ' + gate.reason}"
            )
        if self.experts:
            selected = sum(layer.selected for layer in self.experts)
            lines.append(f"{selected} of {len(self.experts)} layers of experts replaced")
        for names, experts in _runs(self.experts):
            what = "plan, permute, combine in place of " + experts.before
            lines.append(
                f"[{'replaced' if experts.selected else 'left'}] {names} ({experts.experts}): "
                f"{experts.reason or what}"
            )
        if self.losses:
            replaced = sum(loss.replaced for loss in self.losses)
            lines.append(f"{replaced} of {len(self.losses)} load balancing losses replaced")
        lines += [
            f"[{'replaced' if loss.replaced else 'left'}] {loss.name or 'the model'} "
            f"({loss.model}): {loss.reason or 'load_balancing_loss'}"
            for loss in self.losses
        ]
        return "\n".join(lines)

    def runs(self) -> list[tuple[str, Layer]]:
        """Group neighbours that differ in their name only: names, and the first of them."""
        return _runs(self.layers)

    def __rich__(self) -> Table:
        """Return a table for rich."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        built = Table(
            title=str(self).partition("\n")[0],
            title_justify="left",
            box=SIMPLE_HEAD,
            pad_edge=False,
        )
        for column in ("Layers", "Router", "Now", "By", "Why"):
            built.add_column(column, overflow="fold")
        for names, first in self.runs():
            built.add_row(
                names, first.router, first.routing or "its own code", first.backend, first.reason
            )
        for names, gate in _runs(self.gates):
            now = "logits: gate" if gate.gated else "logits: its own code"
            built.add_row(names, gate.router, now, gate.backend, gate.reason)
        for names, experts in _runs(self.experts):
            now = "plan, permute, combine" if experts.selected else "its own code"
            built.add_row(names, experts.experts, now, "", experts.reason)
        for loss in self.losses:
            now = "load_balancing_loss" if loss.replaced else "its own loss"
            built.add_row(loss.name or "the model", loss.model, now, "", loss.reason)
        return built


_Either = TypeVar("_Either", Layer, ExpertsLayer, GateLayer)


def _runs(layers: Iterable[_Either]) -> list[tuple[str, _Either]]:
    found: list[list[_Either]] = []
    for layer in layers:
        if found and replace(found[-1][0], name="") == replace(layer, name=""):
            found[-1].append(layer)
        else:
            found.append([layer])
    return [(_names(run), run[0]) for run in found]


def _names(run: Sequence[Layer] | Sequence[ExpertsLayer] | Sequence[GateLayer]) -> str:
    return run[0].name if len(run) == 1 else f"{run[0].name} to {run[-1].name} ({len(run)})"
