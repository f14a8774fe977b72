"""From a ``RoutingProblem`` to kernels: their compile-time constants, and what each variant can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from moe_routing_registry import RoutingProblem, RoutingSpec

UNROLL_UP_TO = 16
WIDEST_LIST = 16
MOST_CHUNKS = 64
MOST_UNROLLED = {("logits", 16): 16, ("logits", 32): 8}
"""Chunks of a row that are loaded before the first is sorted, by kind and bits; 4 for the others, whose code is long."""
CHUNK = 8


@dataclass(frozen=True, slots=True)
class Launch:
    """How one kernel is launched.

    :ivar variant: ``"lanes"`` (few tokens, every family) or ``"rows"`` (many tokens).
    :ivar block_t: rows a program.
    :ivar lanes: threads that share a row; of the rows variant only.
    :ivar num_warps: warps a program.
    """

    variant: Literal["lanes", "rows"]
    block_t: int
    lanes: int
    num_warps: int


def next_power_of_two(n: int) -> int:
    """Return the least power of two that is not below ``n >= 1``."""
    return 1 << (n - 1).bit_length()


def kind(spec: RoutingSpec) -> Literal["logits", "row_sum", "bias", "grouped"]:
    """Class a spec by what its kernel does for every expert of a row: the tables of launches are kept by that.

    >>> from moe_routing_registry import RoutingSpec
    >>> kind(RoutingSpec(family="f", renormalize=True)), kind(RoutingSpec(family="f"))
    ('logits', 'row_sum')
    """
    if spec.num_groups > 1:
        return "grouped"
    if spec.needs_bias:
        return "bias"
    exact = spec.renormalize and not (spec.renorm_epsilon or spec.renorm_floor)
    return "row_sum" if spec.score == "softmax" and not exact else "logits"


def rows_can(problem: RoutingProblem, lanes: int) -> bool:
    """Tell whether the rows variant serves the problem, given aligned logits."""
    spec, experts = problem.spec, problem.num_experts
    chunks = experts // CHUNK
    return (
        spec.selection in ("logits", "scores_plus_bias", "logits_plus_bias")
        and problem.layout == "rows"
        and experts % CHUNK == 0
        and lanes <= chunks <= MOST_CHUNKS * lanes
        and problem.topk + spec.shared_experts <= WIDEST_LIST
        and not spec.topk_per_group
        and spec.num_groups == 1
    )


def shared_constants(problem: RoutingProblem) -> dict[str, Any]:
    """Return the constants that both variants take."""
    spec = problem.spec
    return {
        "E": problem.num_experts,
        "K": problem.topk,
        "SHARED": spec.shared_experts,
        "SCORE": spec.score,
        "SELECTION": spec.selection,
        "RENORMALIZE": spec.renormalize,
        "EPSILON": float(spec.renorm_epsilon),
        "FLOOR": float(spec.renorm_floor),
        "SCALE": float(spec.scale),
        "MULTIPLIER": float(spec.logit_multiplier),
        "CAP": float(spec.logit_softcap or 0.0),
        "ZERO_EXPERTS": spec.zero_experts,
    }


def constants(problem: RoutingProblem, launch: Launch) -> dict[str, Any]:
    """Return the kernel's constants that do not depend on a call."""
    spec, k = problem.spec, problem.topk
    columns = k + spec.shared_experts
    if launch.variant == "rows":
        width = CHUNK if columns <= CHUNK else WIDEST_LIST
        steps = -(-problem.num_experts // (CHUNK * launch.lanes))
        bits = 32 if problem.dtype == "float32" else 16
        most = MOST_UNROLLED.get((kind(spec), bits), 4)
        unroll = max(d for d in range(1, most + 1) if steps % d == 0)
        rows = {"WIDTH": width, "LANES": launch.lanes, "UNROLL": unroll, "BLOCK_T": launch.block_t}
        return {**shared_constants(problem), **rows}
    groups = 1 if spec.selection in ("token_table", "sparsemixer") else spec.num_groups
    return {
        **shared_constants(problem),
        "NUM_GROUPS": groups,
        "TOPK_GROUPS": min(spec.topk_groups, groups),
        "TOP2": spec.group_score == "top2_sum",
        "PER_GROUP": spec.topk_per_group,
        "JITTER": float(spec.jitter),
        "GROUPS": next_power_of_two(groups),
        "SIZE": next_power_of_two(problem.num_experts // groups),
        "N": next_power_of_two(columns),
        "UNROLL": k if k <= UNROLL_UP_TO else max(d for d in range(1, 9) if k % d == 0),
        "BLOCK_T": launch.block_t,
    }
