"""MoE routing for PyTorch: router logits to expert weights and ids, on any device, proven right.

>>> import torch, moe_routing
>>> route = moe_routing.get_router("mixtral")
>>> weights, ids = route(torch.tensor([[0.0, 3.0, 1.0, 2.0]]), 2)
>>> ids
tensor([[1, 3]], dtype=torch.int32)
>>> route.backend
'eager'

Importing this package imports neither torch nor a backend; the first use of a name below does. Once
both this package and torch are imported, in whichever order, the operators that exported programs
call are registered.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from moe_routing._with_torch import register

if TYPE_CHECKING:
    from moe_routing._dense import DenseRouting, dense
    from moe_routing._public import explain, get_router, list_backends, list_routers, prefer
    from moe_routing._router import Router
    from moe_routing.gating.kernel import GateOutput, RMSNorm
    from moe_routing.kernel import Kernel, Operands, RoutingOutput
    from moe_routing.loads import Load, LoadMonitor, Loads
    from moe_routing.permutation.call import combine, permute
    from moe_routing.permutation.kernel import PermutedRows
    from moe_routing.planning.call import plan
    from moe_routing.planning.kernel import DispatchPlan
    from moe_routing.probing import AbsentDeviceError, UnknownDeviceError, devices, probe
    from moe_routing_registry import (
        BackendUnavailableError,
        ResolutionReport,
        RoutingSpec,
        UnknownNameError,
    )
    from moe_routing_registry.errors import DowngradeWarning, MoeRoutingWarning, PluginWarning

_HOME = {
    "AbsentDeviceError": "moe_routing.probing",
    "BackendUnavailableError": "moe_routing_registry",
    "DenseRouting": "moe_routing._dense",
    "DispatchPlan": "moe_routing.planning.kernel",
    "DowngradeWarning": "moe_routing_registry.errors",
    "GateOutput": "moe_routing.gating.kernel",
    "Kernel": "moe_routing.kernel",
    "Load": "moe_routing.loads",
    "LoadMonitor": "moe_routing.loads",
    "Loads": "moe_routing.loads",
    "MoeRoutingWarning": "moe_routing_registry.errors",
    "Operands": "moe_routing.kernel",
    "PermutedRows": "moe_routing.permutation.kernel",
    "PluginWarning": "moe_routing_registry.errors",
    "RMSNorm": "moe_routing.gating.kernel",
    "ResolutionReport": "moe_routing_registry",
    "Router": "moe_routing._router",
    "RoutingOutput": "moe_routing.kernel",
    "RoutingSpec": "moe_routing_registry",
    "UnknownDeviceError": "moe_routing.probing",
    "UnknownNameError": "moe_routing_registry",
    "combine": "moe_routing.permutation.call",
    "dense": "moe_routing._dense",
    "devices": "moe_routing.probing",
    "explain": "moe_routing._public",
    "get_router": "moe_routing._public",
    "list_backends": "moe_routing._public",
    "list_routers": "moe_routing._public",
    "permute": "moe_routing.permutation.call",
    "plan": "moe_routing.planning.call",
    "prefer": "moe_routing._public",
    "probe": "moe_routing.probing",
}

_MODULES = frozenset({"distributed"})

__version__ = "0.1.0"
__all__ = [
    "AbsentDeviceError",
    "BackendUnavailableError",
    "DenseRouting",
    "DispatchPlan",
    "DowngradeWarning",
    "GateOutput",
    "Kernel",
    "Load",
    "LoadMonitor",
    "Loads",
    "MoeRoutingWarning",
    "Operands",
    "PermutedRows",
    "PluginWarning",
    "RMSNorm",
    "ResolutionReport",
    "Router",
    "RoutingOutput",
    "RoutingSpec",
    "UnknownDeviceError",
    "UnknownNameError",
    "combine",
    "dense",
    "devices",
    "explain",
    "get_router",
    "list_backends",
    "list_routers",
    "permute",
    "plan",
    "prefer",
    "probe",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 -- the TYPE_CHECKING block above holds the types
    """Import a public name on its first use."""
    if name in _MODULES:
        return importlib.import_module(f"moe_routing.{name}")
    if name not in _HOME:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted({*globals(), *__all__})


register()
