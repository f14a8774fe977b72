"""Wrong backends of ``gate``, and changes of the product that make it wrong.

``tests/conformance/test_gate_mutants.py`` holds the kit to both.
"""

from __future__ import annotations

from mutants.gating import declining, logits, memory, on_cuda, product, routing
from mutants.gating._mutant import MUTANTS, Fused, Projects
from mutants.gating.product import CHANGES

__all__ = [
    "CHANGES", "MUTANTS", "Fused", "Projects", "declining", "logits", "memory", "on_cuda",
    "product", "routing",
]  # fmt: skip
