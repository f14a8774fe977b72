"""Wrong backends of the operation ``plan``, and changes of the product that make it wrong.

``MUTANTS`` are backends. What ``moe_routing.plan`` does for every backend has no backend that does
it wrong, so ``CHANGES`` change the product. ``tests/conformance/test_plan_mutants.py`` holds the
kit to both.
"""

from __future__ import annotations

from mutants.planning import declining, layouts, memory, on_cuda, order, product, state
from mutants.planning._mutant import MUTANTS, Reference
from mutants.planning.product import CHANGES

__all__ = [
    "CHANGES", "MUTANTS", "Reference", "declining", "layouts", "memory", "on_cuda",
    "order", "product", "state",
]  # fmt: skip
