"""Loading plug-ins: each one alone, so that a broken plug-in costs only itself."""

from __future__ import annotations

import importlib
import importlib.metadata
import textwrap
import traceback
import warnings
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import pluggy

from moe_routing_registry import _hooks
from moe_routing_registry._card import BackendSpec, FamilySpec
from moe_routing_registry._errors import DuplicateNameError, PluginWarning
from moe_routing_registry._report import Rejection
from moe_routing_registry._verdict import RejectCode, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

PLUGIN_FAILURES = (Exception, SystemExit)
"""What a plug-in may raise without taking the host with it: some packages call ``exit`` at import."""


@dataclass
class Inventory:
    """What loading found.

    :ivar backends: cards by name.
    :ivar families: cards by family name.
    :ivar distributions: the distribution behind each card, by ``(kind, name)``.
    :ivar failures: plug-ins that failed, with their traceback.
    :ivar duplicates: names that two distributions claim.
    """

    backends: dict[str, BackendSpec] = field(default_factory=dict)
    families: dict[str, FamilySpec] = field(default_factory=dict)
    distributions: dict[tuple[str, str], str] = field(default_factory=dict)
    failures: list[Rejection] = field(default_factory=list)
    duplicates: list[DuplicateNameError] = field(default_factory=list)

    def fail(self, name: str, distribution: str, code: RejectCode, doing: str, error: BaseException) -> None:
        """Keep the failure for doctor and say once that there was one."""
        reason = sentence(doing, error)
        trace = "".join(traceback.format_exception(error))
        fix = (
            f"pip uninstall {distribution.partition(' ')[0]}"
            if code is RejectCode.IMPORT_FAILED and distribution != "(unknown)"
            else ""
        )
        self.failures.append(
            Rejection(name=name, verdict=Verdict.no(code, reason, fix), distribution=distribution, traceback=trace)
        )
        warnings.warn(
            f"plug-in {name!r} of {distribution} is not used: {reason}; `moe-routing doctor --verbose` shows the traceback",
            PluginWarning,
            stacklevel=2,
        )

    def add(self, kind: str, cards: dict[str, Any], name: str, card: object, distribution: str) -> None:
        """File a card, or the fact that its name is taken."""
        if name in cards:
            self.duplicates.append(DuplicateNameError(kind, name, self.distributions[kind, name], distribution))
            return
        cards[name] = card
        self.distributions[kind, name] = distribution


def load(built_in: Mapping[str, str]) -> Inventory:
    """Load the entry points of the group, and those of ``built_in`` (name -> module) that no metadata names."""
    inventory = Inventory()
    manager = pluggy.PluginManager(_hooks.PROJECT)
    manager.add_hookspecs(_hooks)
    found: dict[str, tuple[str, Callable[[], object], str]] = {}
    for point in importlib.metadata.entry_points(group=_hooks.ENTRY_POINT_GROUP):
        # Two installations of one distribution on sys.path (a raw tree over a wheel) name the same plug-in twice.
        found.setdefault(f"{point.name}={point.value}", (point.name, point.load, _distribution(point)))
    for name, module in built_in.items():
        found.setdefault(f"{name}={module}", (name, partial(importlib.import_module, module), "moe-routing (no metadata)"))
    for key, (name, importer, distribution) in found.items():
        _load_one(inventory, manager, key, name, importer, distribution)
    return inventory


def sentence(doing: str, error: BaseException) -> str:
    """Say in one line what raised; compilers raise pages, of which the traceback keeps every word."""
    return textwrap.shorten(f"{doing} raised {type(error).__name__}: {error}", width=300, placeholder=" ...")


def _distribution(point: importlib.metadata.EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "(unknown)"


def _load_one(  # noqa: PLR0913, PLR0917 -- private, and called once
    inventory: Inventory,
    manager: pluggy.PluginManager,
    key: str,
    name: str,
    importer: Callable[[], object],
    distribution: str,
) -> None:
    try:
        plugin = importer()
    except PLUGIN_FAILURES as error:
        inventory.fail(name, distribution, RejectCode.IMPORT_FAILED, "its import", error)
        return
    try:
        manager.register(plugin, name=key)
        others = [p for p in manager.get_plugins() if p is not plugin]
        backends = manager.subset_hook_caller("moe_routing_backends", others)()
        families = manager.subset_hook_caller("moe_routing_families", others)()
        cards = [_checked(card, BackendSpec) for some in backends for card in some]
        rows = [_checked(row, FamilySpec) for some in families for row in some]
    except PLUGIN_FAILURES as error:
        inventory.fail(name, distribution, RejectCode.REGISTRATION_FAILED, "its registration", error)
        return
    for card in cards:
        inventory.add("backend", inventory.backends, card.name, card, distribution)
    for row in rows:
        inventory.add("family", inventory.families, row.spec.family, row, distribution)


def _checked(card: object, kind: type[Any]) -> Any:  # noqa: ANN401 -- the isinstance check is the type
    if not isinstance(card, kind):
        msg = f"expected a {kind.__name__}, got {card!r}"
        raise TypeError(msg)
    return card
