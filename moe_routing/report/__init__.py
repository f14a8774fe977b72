"""One page for one machine: ``moe-routing report``. Works where torch is missing or broken."""

from moe_routing.report._gather import Gathered, gather
from moe_routing.report._page import to_html

__all__ = ["Gathered", "gather", "to_html"]
