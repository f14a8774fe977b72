"""What a routing backend is, and how one is found and chosen. Never imports torch."""

from moe_routing_registry.backend_spec import (
    ACCELERATOR,
    ANY,
    BackendSpec,
    FamilySpec,
    Target,
    knows_score,
)
from moe_routing_registry.device import DeviceInfo, Toolchain
from moe_routing_registry.errors import BackendUnavailableError, UnknownNameError
from moe_routing_registry.hooks import hookimpl
from moe_routing_registry.operation import OperationSpec, Problem
from moe_routing_registry.problem import RoutingProblem
from moe_routing_registry.registry import Registry
from moe_routing_registry.report import ResolutionReport
from moe_routing_registry.request import Request
from moe_routing_registry.routing_spec import RoutingSpec
from moe_routing_registry.verdict import RejectCode, Verdict

__all__ = [
    "ACCELERATOR",
    "ANY",
    "BackendSpec",
    "BackendUnavailableError",
    "DeviceInfo",
    "FamilySpec",
    "OperationSpec",
    "Problem",
    "Registry",
    "RejectCode",
    "Request",
    "ResolutionReport",
    "RoutingProblem",
    "RoutingSpec",
    "Target",
    "Toolchain",
    "UnknownNameError",
    "Verdict",
    "hookimpl",
    "knows_score",
]
