"""Expert parallelism on torch.distributed: the experts of a layer on the ranks of a group.

Users construct an ``ExpertParallel``. Its transport is a backend of the operation ``exchange``,
which the registry chooses. Importing this package imports no torch; the names below
import what they need on their first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_routing.distributed.expert_parallel import (
        Dispatched,
        DispatchedWithScales,
        ExpertParallel,
    )
    from moe_routing.distributed.kernel import (
        CapacityError,
        Checks,
        CombinesPlanned,
        Exchange,
        ExchangeKernel,
        Received,
        Tokens,
    )
    from moe_routing.distributed.problem import ExchangeProblem

_HOME = {
    "CapacityError": "moe_routing.distributed.kernel",
    "Checks": "moe_routing.distributed.kernel",
    "CombinesPlanned": "moe_routing.distributed.kernel",
    "Dispatched": "moe_routing.distributed.expert_parallel",
    "DispatchedWithScales": "moe_routing.distributed.expert_parallel",
    "Exchange": "moe_routing.distributed.kernel",
    "ExchangeKernel": "moe_routing.distributed.kernel",
    "ExchangeProblem": "moe_routing.distributed.problem",
    "ExpertParallel": "moe_routing.distributed.expert_parallel",
    "Received": "moe_routing.distributed.kernel",
    "Tokens": "moe_routing.distributed.kernel",
}

__all__ = [
    "CapacityError",
    "Checks",
    "CombinesPlanned",
    "Dispatched",
    "DispatchedWithScales",
    "Exchange",
    "ExchangeKernel",
    "ExchangeProblem",
    "ExpertParallel",
    "Received",
    "Tokens",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 -- the TYPE_CHECKING block above holds the types
    """Import a public name on its first use."""
    if name not in _HOME:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value
