"""The families' maths in plain PyTorch operations, for every backend that is made of them.

Selection, weights, gradient.
"""

from __future__ import annotations

from moe_routing.formula.gradient import weights_backward
from moe_routing.formula.route import finish, route
from moe_routing.formula.select import (
    NARROW_UP_TO,
    Select,
    Top,
    by_narrow_rounds,
    by_rounds,
    by_rounds_in_place,
    by_sort,
    by_topk,
    whole,
)

__all__ = [
    "NARROW_UP_TO",
    "Select",
    "Top",
    "by_narrow_rounds",
    "by_rounds",
    "by_rounds_in_place",
    "by_sort",
    "by_topk",
    "finish",
    "route",
    "weights_backward",
    "whole",
]
