"""Scale on paper: traffic and time of an exchange against ranks and hosts.

A model with constants that were measured, free of torch. ``moe-routing scale`` prints it.
"""

from __future__ import annotations

from moe_routing.distributed.scale.times import (
    CONSTANTS,
    Change,
    Constants,
    DeviceTime,
    Estimate,
    Network,
    Source,
    changes_by_ranks,
    changes_by_tokens,
    estimates,
    fastest,
    microseconds,
    shipped,
)
from moe_routing.distributed.scale.traffic import (
    WAYS,
    Deployment,
    Traffic,
    Way,
    expected_reached,
    traffic,
)

__all__ = [
    "CONSTANTS",
    "WAYS",
    "Change",
    "Constants",
    "Deployment",
    "DeviceTime",
    "Estimate",
    "Network",
    "Source",
    "Traffic",
    "Way",
    "changes_by_ranks",
    "changes_by_tokens",
    "estimates",
    "expected_reached",
    "fastest",
    "microseconds",
    "shipped",
    "traffic",
]
