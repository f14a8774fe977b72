"""What ``moe-routing doctor`` finds out, and how it shows it.

Works where torch is missing or broken.
"""

from moe_routing.doctor._check import Check
from moe_routing.doctor._environment import OTHER_VARIABLES, VARIABLES
from moe_routing.doctor._examine import CHECKS, SCHEMA_VERSION, examine
from moe_routing.doctor._machine import Failure
from moe_routing.doctor._ranks import SECONDS, SECONDS_VERIFYING, examined_by_ranks, launched

__all__ = [
    "CHECKS",
    "OTHER_VARIABLES",
    "SCHEMA_VERSION",
    "SECONDS",
    "SECONDS_VERIFYING",
    "VARIABLES",
    "Check",
    "Failure",
    "examine",
    "examined_by_ranks",
    "launched",
]
