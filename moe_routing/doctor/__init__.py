"""What ``moe-routing doctor`` finds out, and how it shows it.

Works where torch is missing or broken.
"""

from moe_routing.doctor._check import Check
from moe_routing.doctor._examine import CHECKS, SCHEMA_VERSION, examine
from moe_routing.doctor._machine import Failure

__all__ = ["CHECKS", "SCHEMA_VERSION", "Check", "Failure", "examine"]
