"""Wrong backends of ``permute`` and ``combine``, and changes of the product that make it wrong.

``MUTANTS`` are backends of either operation. What the product does for every backend has no backend
that does it wrong, so ``CHANGES`` change the product.
``tests/conformance/test_permutation_mutants.py`` holds the kit to both.
"""

from __future__ import annotations

from mutants.permutation import declining, gradients, memory, moved, on_cuda, product, state, sums
from mutants.permutation._mutant import MUTANTS, Combines, Permutes
from mutants.permutation.product import CHANGES

__all__ = [
    "CHANGES", "MUTANTS", "Combines", "Permutes", "declining", "gradients", "memory",
    "moved", "on_cuda", "product", "state", "sums",
]  # fmt: skip
