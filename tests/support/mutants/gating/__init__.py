"""Wrong backends of ``gate``, and changes of the product that make it wrong.

``tests/conformance/test_gate_mutants.py`` holds the kit to both.
"""

from __future__ import annotations

from mutants.gating import declining, logits, memory, on_cuda, planning, product, routing
from mutants.gating._mutant import MUTANTS, PLANS, Fused, Planned, Projects
from mutants.gating.product import CHANGES

__all__ = [
    "CHANGES", "MUTANTS", "PLANS", "Fused", "Planned", "Projects", "declining", "logits", "memory",
    "on_cuda", "planning", "product", "routing",
]  # fmt: skip
