"""Deliberately wrong backends, one for each way in which a backend can be wrong.

The kit must catch every one.

``MUTANTS`` names the check that must catch each, and what it must say;
``tests/conformance/test_mutants.py`` holds the kit to that. A module holds the mutants of a few
clauses.
"""

from __future__ import annotations

from mutants import (
    calls,
    declining,
    fields,
    gradients,
    on_cuda,
    operands,
    replay,
    selection,
    sizes,
    state,
    weights,
)
from mutants._mutant import MUTANTS, Mutant, Reference, registered

__all__ = [
    "MUTANTS", "Mutant", "Reference", "calls", "declining", "fields", "gradients", "on_cuda",
    "operands", "registered", "replay", "selection", "sizes", "state", "weights",
]  # fmt: skip
