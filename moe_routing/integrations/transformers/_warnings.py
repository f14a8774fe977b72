"""Warnings that a call gives once."""

from __future__ import annotations

import warnings
from functools import cache

from moe_routing import MoeRoutingWarning


@cache
def warn_once(text: str) -> None:
    """Warn, unless the same was said before in this process."""
    warnings.warn(text, MoeRoutingWarning, stacklevel=3)
