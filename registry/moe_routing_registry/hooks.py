"""The hooks that a plug-in may implement. Each is documented in ``docs/``; a test holds that."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moe_routing_registry.backend_spec import BackendSpec, FamilySpec
    from moe_routing_registry.operation import OperationSpec

PROJECT = "moe_routing"
ENTRY_POINT_GROUP = "moe_routing.backends"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a plug-in's function as the implementation of the hook of the same name."""


@hookspec
def moe_routing_backends() -> Sequence[BackendSpec]:  # type: ignore[empty-body]
    """Return the specs of the backends that this plug-in provides.

    Called once, when the registry is first used. Import neither torch nor the backend here: the
    spec names the factory, which is imported when it is chosen.
    """


@hookspec
def moe_routing_families() -> Sequence[FamilySpec]:  # type: ignore[empty-body]
    """Return the specs of the routing families that this plug-in provides, with their oracles."""


@hookspec
def moe_routing_operations() -> Sequence[OperationSpec]:  # type: ignore[empty-body]
    """Return the specs of the operations that this plug-in provides.

    The backends of any plug-in may have factories for them.
    """
