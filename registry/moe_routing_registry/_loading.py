"""Loading plug-ins: each one alone, so that a broken plug-in costs only itself."""

from __future__ import annotations

import importlib
import importlib.metadata
import shlex
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import pluggy

from moe_routing_registry import hooks
from moe_routing_registry.backend_spec import BackendSpec, FamilySpec
from moe_routing_registry.containment import PluginFailure, contained
from moe_routing_registry.errors import DuplicateNameError
from moe_routing_registry.operation import OperationSpec
from moe_routing_registry.report import Rejection
from moe_routing_registry.text import refusal
from moe_routing_registry.verdict import RejectCode, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

_UNKNOWN = "(unknown)"


class Plugin(NamedTuple):
    """A plug-in that was found and is not imported yet.

    :ivar key: name and module of its entry point; what it is left out by.
    :ivar name: name of its entry point.
    :ivar distribution: the distribution that brings it, ``"moe-routing 0.1.0"`` for example.
    :ivar importer: imports it.
    :ivar built_in: whether it is one of this project's own.
    """

    key: str
    name: str
    distribution: str
    importer: Callable[[], object]
    built_in: bool


class Brought(NamedTuple):
    """The specs that a plug-in brings."""

    backends: list[BackendSpec]
    families: list[FamilySpec]
    operations: list[OperationSpec]


@dataclass
class Inventory:
    """What loading found.

    :ivar backends: backend specs by name.
    :ivar families: family specs by family name.
    :ivar operations: operation specs by name.
    :ivar distributions: the distribution that brought each spec, by ``(kind, name)``.
    :ivar plugins: the plug-in that brought each backend, by the backend's name.
    :ivar failures: plug-ins that failed, with their traceback.
    :ivar duplicates: backend names that two distributions claim.
    """

    backends: dict[str, BackendSpec] = field(default_factory=dict)
    families: dict[str, FamilySpec] = field(default_factory=dict)
    operations: dict[str, OperationSpec] = field(default_factory=dict)
    distributions: dict[tuple[str, str], str] = field(default_factory=dict)
    plugins: dict[str, Plugin] = field(default_factory=dict)
    failures: list[Rejection] = field(default_factory=list)
    duplicates: list[DuplicateNameError] = field(default_factory=list)

    def fail(
        self, name: str, distribution: str, code: RejectCode, reason: str, trace: str = ""
    ) -> None:
        """Keep a failure, for the warning and for doctor."""
        uninstall = code is RejectCode.IMPORT_FAILED and distribution != _UNKNOWN
        fix = f"pip uninstall {shlex.quote(distribution.partition(' ')[0])}" if uninstall else ""
        verdict = Verdict.no(code, reason, fix)
        self.failures.append(
            Rejection(name=name, verdict=verdict, distribution=distribution, traceback=trace)
        )

    def add(self, spec: BackendSpec, distribution: str) -> None:
        """Add a backend, or the fact that its name is taken."""
        if spec.name in self.backends:
            kind, taken_by = "backend", self.distributions["backend", spec.name]
            self.duplicates.append(DuplicateNameError(kind, spec.name, taken_by, distribution))
            return
        self.backends[spec.name] = spec
        self.distributions["backend", spec.name] = distribution

    def add_all_of(self, plugin: Plugin, brought: Brought) -> None:
        """Add everything that a plug-in brings."""
        for backend in brought.backends:
            self.add(backend, plugin.distribution)
            self.plugins.setdefault(backend.name, plugin)
        for family in brought.families:
            self.families[family.spec.family] = family
            self.distributions["family", family.spec.family] = plugin.distribution
        for operation in brought.operations:
            self.operations[operation.name] = operation
            self.distributions["operation", operation.name] = plugin.distribution


def load(
    built_in: Mapping[str, str],
    reserved: Collection[str],
    operations: Mapping[str, OperationSpec],
    left_out: Mapping[str, str],
    on_plugin: Callable[[Plugin], object],
) -> Inventory:
    """Load the plug-ins: the entry points of the group, and the built-in plug-ins.

    :param built_in: name -> module of each built-in plug-in, for those that no metadata names.
    :param reserved: names of the built-in families and models, which no plug-in may bring.
    :param operations: the built-in operations, by name.
    :param left_out: key of a plug-in -> why it is not loaded.
    :param on_plugin: called with each plug-in before it is imported.
    """
    inventory = Inventory(operations=dict(operations))
    # Built-in plug-ins come first: their names are theirs.
    for plugin in sorted(discover(built_in, inventory), key=lambda plugin: not plugin.built_in):
        if plugin.key in left_out:
            inventory.fail(
                plugin.name, plugin.distribution, RejectCode.IMPORT_FAILED, left_out[plugin.key]
            )
        else:
            on_plugin(plugin)
            _load_one(plugin, inventory, reserved)
    return inventory


def discover(built_in: Mapping[str, str], inventory: Inventory) -> list[Plugin]:
    """Find the plug-ins without importing them.

    Metadata that cannot be read is a failure in the inventory.
    """
    found: dict[str, Plugin] = {}
    for point in _entry_points(inventory):
        # Two installations of one distribution on sys.path (a raw tree over a wheel) name the same
        # plug-in twice.
        key = f"{point.name}={point.value}"
        brought_by = _name_of(point.dist) if point.dist else _UNKNOWN
        found.setdefault(
            key,
            Plugin(
                key, point.name, brought_by, point.load, built_in.get(point.name) == point.value
            ),
        )
    for name, module in built_in.items():
        key = f"{name}={module}"
        importer = partial(importlib.import_module, module)
        found.setdefault(
            key, Plugin(key, name, "moe-routing (no metadata)", importer, built_in=True)
        )
    return list(found.values())


def _entry_points(inventory: Inventory) -> list[importlib.metadata.EntryPoint]:
    try:
        with contained("reading metadata"):
            return list(importlib.metadata.entry_points(group=hooks.ENTRY_POINT_GROUP))
    except PluginFailure:
        pass  # one distribution's metadata cannot be read: read them one by one
    found: dict[str, list[importlib.metadata.EntryPoint]] = {}
    for distribution in importlib.metadata.distributions():
        name = _name_of(distribution)
        try:
            with contained("reading its entry_points.txt"):
                points = [
                    point
                    for point in distribution.entry_points
                    if point.group == hooks.ENTRY_POINT_GROUP
                ]
        except PluginFailure as failure:
            code, short = RejectCode.IMPORT_FAILED, name.partition(" ")[0]
            inventory.fail(short, name, code, failure.sentence, failure.trace)
        else:
            # As in `entry_points`, of two installations of a distribution the first on sys.path
            # counts.
            found.setdefault(name.partition(" ")[0], points)
    return [point for points in found.values() for point in points]


def _name_of(distribution: importlib.metadata.Distribution) -> str:
    try:
        with contained("reading its METADATA"):
            return f"{distribution.metadata['Name']} {distribution.version}"
    except PluginFailure:
        return _UNKNOWN


def _load_one(plugin: Plugin, inventory: Inventory, reserved: Collection[str]) -> None:
    try:
        # A plug-in that turns warnings into errors, or off, does so for itself, here and below.
        with contained("its import"), warnings.catch_warnings():
            module = plugin.importer()
    except PluginFailure as failure:
        code = RejectCode.IMPORT_FAILED
        inventory.fail(plugin.name, plugin.distribution, code, failure.sentence, failure.trace)
        return
    try:
        with contained("its registration"), warnings.catch_warnings():
            brought = _specs(module, plugin.key)
            _check_names(plugin, brought, inventory, reserved)
    except PluginFailure as failure:
        code = RejectCode.REGISTRATION_FAILED
        inventory.fail(plugin.name, plugin.distribution, code, failure.sentence, failure.trace)
        return
    inventory.add_all_of(plugin, brought)


def _specs(module: object, key: str) -> Brought:
    """Call a plug-in's hooks.

    It has a manager of its own, so that neither its failure nor its wrappers reach another.
    """
    manager = pluggy.PluginManager(hooks.PROJECT)
    manager.add_hookspecs(hooks)
    manager.register(module, name=key)
    manager.check_pending()
    hook = manager.hook
    ours = (hook.moe_routing_backends, hook.moe_routing_families, hook.moe_routing_operations)
    if not any(each.get_hookimpls() for each in ours):
        msg = f"it implements none of the hooks {', '.join(each.name for each in ours)}"
        raise ValueError(msg)
    return Brought(
        *(
            _called(each, kind)
            for each, kind in zip(ours, (BackendSpec, FamilySpec, OperationSpec), strict=True)
        )
    )


def _called(hook: pluggy.HookCaller, kind: type[Any]) -> list[Any]:
    """Call a hook, and return the specs of all its implementations.

    :raises TypeError: an implementation returns anything but a sequence of specs of that kind.
    """
    expected = f"a sequence of {kind.__name__}"
    results: list[object] = hook()
    if hook.get_hookimpls() and not results:  # pluggy drops what is None
        raise TypeError(refusal(hook.name, expected, None))
    specs: list[Any] = []
    for result in results:
        # Exactly these classes: their fields have been checked, and nothing of theirs raises later.
        # Read once: a sequence of the plug-in's own may answer otherwise the next time.
        brought = list(result) if isinstance(result, Sequence) else [None]
        if not all(type(spec) is kind for spec in brought):
            raise TypeError(refusal(hook.name, expected, result))
        specs += brought
    return specs


def _check_names(
    plugin: Plugin, brought: Brought, inventory: Inventory, reserved: Collection[str]
) -> None:
    """Raise ``ValueError`` for a name that is taken.

    A name is taken if it is built in, if the distribution uses it for two backends, or if it is
    the name of a family, a model or an operation already.
    """
    own = [spec.name for spec in brought.backends]
    for name in own:
        owner = inventory.plugins.get(name)
        if owner is not None and owner.built_in:
            msg = f"{name!r} is the name of a built-in backend; a plug-in's needs another"
            raise ValueError(msg)
        if own.count(name) > 1 or (
            owner is not None and owner.distribution == plugin.distribution != _UNKNOWN
        ):
            msg = f"{name!r} is the name of two of its backends"
            raise ValueError(msg)
    taken = {name: other for other, row in inventory.families.items() for name in row.names}
    for row in brought.families:
        for name in sorted(row.names):
            if name in reserved:
                what = "a built-in family or model"
                msg = f"{name!r} is the name of {what}; a plug-in's needs another"
                raise ValueError(msg)
            if name in taken:
                key = ("family", taken[name])
                brought_by = inventory.distributions.get(key, plugin.distribution)
                msg = f"{name!r} is the name of a family or model of {brought_by} already"
                raise ValueError(msg)
        taken |= dict.fromkeys(row.names, row.spec.family)
    names = set(inventory.operations)
    for operation in brought.operations:
        if operation.name in names:
            brought_by = inventory.distributions.get(("operation", operation.name), "moe-routing")
            msg = f"{operation.name!r} is the name of an operation of {brought_by} already"
            raise ValueError(msg)
        names.add(operation.name)
