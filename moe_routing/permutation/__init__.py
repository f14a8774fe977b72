"""The operations ``permute`` and ``combine``: rows of tokens to the order of a plan, and back.

``moe_routing.permute`` and ``moe_routing.combine`` are what users call. Importing this package
imports neither torch nor the registry; the names below import what they need on their first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_routing.permutation.kernel import (
        CombineKernel,
        CombinesBackward,
        PermutedRows,
        PermuteKernel,
    )
    from moe_routing.permutation.problem import CombineProblem, PermuteProblem

_HOME = {
    "CombineKernel": "moe_routing.permutation.kernel",
    "CombineProblem": "moe_routing.permutation.problem",
    "CombinesBackward": "moe_routing.permutation.kernel",
    "PermuteKernel": "moe_routing.permutation.kernel",
    "PermuteProblem": "moe_routing.permutation.problem",
    "PermutedRows": "moe_routing.permutation.kernel",
}

__all__ = [
    "CombineKernel",
    "CombineProblem",
    "CombinesBackward",
    "PermuteKernel",
    "PermuteProblem",
    "PermutedRows",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 -- the TYPE_CHECKING block above holds the types
    """Import a public name on its first use."""
    if name not in _HOME:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value
