"""What keeps experts equally busy: losses, updates of the bias, and replicas of busy experts.

    loss = balancing.load_balancing_loss(logits, ids) * 0.01 + balancing.z_loss(logits) * 0.001
    balancing.update_bias(bias, counts, 0.001)
    placement = balancing.place_replicas(loads, num_slots=160, num_ranks=8)

``logits`` and ``ids`` are what a router was given and returned. Importing this package imports
neither torch nor the registry; the names below import what they need on their first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_routing.balancing._bias import update_bias
    from moe_routing.balancing._replicas import Placement, place_replicas
    from moe_routing.balancing.kernel import BalanceKernel, BalancesBackward
    from moe_routing.balancing.losses import load_balancing_loss, sequence_balancing_loss, z_loss
    from moe_routing.balancing.problem import BalanceProblem

_HOME = {
    "BalanceKernel": "moe_routing.balancing.kernel",
    "BalanceProblem": "moe_routing.balancing.problem",
    "BalancesBackward": "moe_routing.balancing.kernel",
    "Placement": "moe_routing.balancing._replicas",
    "load_balancing_loss": "moe_routing.balancing.losses",
    "place_replicas": "moe_routing.balancing._replicas",
    "sequence_balancing_loss": "moe_routing.balancing.losses",
    "update_bias": "moe_routing.balancing._bias",
    "z_loss": "moe_routing.balancing.losses",
}

__all__ = [
    "BalanceKernel",
    "BalanceProblem",
    "BalancesBackward",
    "Placement",
    "load_balancing_loss",
    "place_replicas",
    "sequence_balancing_loss",
    "update_bias",
    "z_loss",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 -- the TYPE_CHECKING block above holds the types
    """Import a public name on its first use."""
    if name not in _HOME:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value
