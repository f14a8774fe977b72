"""What a routing backend is, and how one is found and chosen. Never imports torch."""

from moe_routing_registry._card import (
    ACCELERATOR,
    ANY,
    API_VERSION,
    CAPABILITIES,
    BackendSpec,
    FamilySpec,
    SupportRule,
    Target,
    knows_score,
)
from moe_routing_registry._containment import PluginFailure, contained, sentence
from moe_routing_registry._device import INTERPRETER, DeviceInfo, Toolchain, triton_interprets
from moe_routing_registry._errors import (
    BackendUnavailableError,
    DowngradeWarning,
    DuplicateNameError,
    MoeRoutingWarning,
    PluginWarning,
    UnknownNameError,
)
from moe_routing_registry._hooks import ENTRY_POINT_GROUP, hookimpl
from moe_routing_registry._locks import ForkSafeLock
from moe_routing_registry._operation import OperationSpec, Problem
from moe_routing_registry._problem import Layout, RoutingProblem
from moe_routing_registry._registry import FactoryError, Registry
from moe_routing_registry._report import Candidate, Rejection, ResolutionReport
from moe_routing_registry._request import (
    BACKEND_VARIABLE,
    BLOCK_VARIABLE,
    STRICT_VARIABLE,
    VERIFY_VARIABLE,
    AskedBy,
    Request,
    flag,
    preference,
    preferring,
    verify_rate,
)
from moe_routing_registry._spec import SCORES, SELECTIONS, GroupScore, RoutingSpec, Selection
from moe_routing_registry._text import printable, refusal, shown
from moe_routing_registry._verdict import RejectCode, Verdict

__all__ = [
    "ACCELERATOR",
    "ANY",
    "API_VERSION",
    "BACKEND_VARIABLE",
    "BLOCK_VARIABLE",
    "CAPABILITIES",
    "ENTRY_POINT_GROUP",
    "INTERPRETER",
    "SCORES",
    "SELECTIONS",
    "STRICT_VARIABLE",
    "VERIFY_VARIABLE",
    "AskedBy",
    "BackendSpec",
    "BackendUnavailableError",
    "Candidate",
    "DeviceInfo",
    "DowngradeWarning",
    "DuplicateNameError",
    "FactoryError",
    "FamilySpec",
    "ForkSafeLock",
    "GroupScore",
    "Layout",
    "MoeRoutingWarning",
    "OperationSpec",
    "PluginFailure",
    "PluginWarning",
    "Problem",
    "Registry",
    "RejectCode",
    "Rejection",
    "Request",
    "ResolutionReport",
    "RoutingProblem",
    "RoutingSpec",
    "Selection",
    "SupportRule",
    "Target",
    "Toolchain",
    "UnknownNameError",
    "Verdict",
    "contained",
    "flag",
    "hookimpl",
    "knows_score",
    "preference",
    "preferring",
    "printable",
    "refusal",
    "sentence",
    "shown",
    "triton_interprets",
    "verify_rate",
]
