"""One page for one machine: ``moe-routing report``. Works where torch is missing or broken."""

from moe_routing.report._gather import Gathered, Tried, gather
from moe_routing.report._page import to_html

__all__ = ["Gathered", "Tried", "gather", "to_html"]
