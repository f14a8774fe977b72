"""Wrong backends of ``gate``, and changes of the product that make it wrong.

``tests/conformance/test_gate_mutants.py`` holds the kit to both.
"""

from __future__ import annotations

from mutants.gating._mutant import MUTANTS, Fused, Projects

__all__ = ["MUTANTS", "Fused", "Projects"]
