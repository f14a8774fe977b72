"""The problem that doctor asks every backend for."""

from __future__ import annotations

from moe_routing.families import FAMILIES
from moe_routing.gating.problem import GateProblem

GATE_EXAMPLE = GateProblem(
    spec=FAMILIES["gemma4"].spec,
    num_experts=128,
    topk=8,
    hidden_size=2816,
    dtype="bfloat16",
    norm="rms",
    input_scale=True,
)
"""Gemma 4's router."""
