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
BEST_OF_GROUP = 2
"""Experts whose sum is a group's score."""
MOST_SORTED = 64
"""Experts of a row that one thread of the tiles variant sorts."""
MOST_SIEVED = 16
"""Chunks of a row that one thread of the sieve variant keeps in registers."""
MOST_TILED = 4
"""Threads a row up to which the sieve reads rows as they lie in memory; with 8 the exchange costs more than it saves."""
LEAST_GROUPS = 8
"""The sieve groups experts as long as there are so many groups for each expert that is selected."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How one kernel is launched.

    :ivar variant: ``"lanes"`` (few tokens, every family), ``"rows"``, ``"sieve"`` (many tokens) or ``"tiles"`` (many, with a
        score for every expert or groups).
    :ivar block_t: rows a program.
    :ivar lanes: threads that share a row; not of the lanes variant.
    :ivar num_warps: warps a program.
    :ivar warp_size: lanes a warp, where the device has a choice (Intel's sub-groups, ``xpu.py``); 0 says nothing.
    """

    variant: Literal["lanes", "rows", "sieve", "tiles"]
    block_t: int
    lanes: int
    num_warps: int
    warp_size: int = 0


def next_power_of_two(n: int) -> int:
    """Return the least power of two that is not below ``n >= 1``."""
    return 1 << (n - 1).bit_length()


Kind = Literal["logits", "row_sum", "sigmoid_bias", "bias", "grouped"]
GUESSED: Kind = "sigmoid_bias"
"""Biased scores that the sieve serves by guesses; where there is no sieve they are as other biased ones."""


def kind(spec: RoutingSpec) -> Kind:
    """Class a spec by what its kernel does for every expert of a row: the tables of launches are kept by that.

    >>> from moe_routing_registry import RoutingSpec
    >>> kind(RoutingSpec(family="f", renormalize=True)), kind(RoutingSpec(family="f"))
    ('logits', 'row_sum')
    """
    if spec.num_groups > 1:
        return "grouped"
    if spec.needs_bias:
        plain = spec.selection == "scores_plus_bias" and spec.logit_multiplier == 1 and not spec.logit_softcap
        return GUESSED if plain and spec.score == "sigmoid" else "bias"
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


def sieve_can(problem: RoutingProblem, lanes: int) -> bool:
    """Tell whether the sieve variant serves the problem, given aligned logits and a device that it is for."""
    chunks = problem.num_experts // CHUNK
    return kind(problem.spec) != "bias" and rows_can(problem, lanes) and chunks % lanes == 0 and chunks <= MOST_SIEVED * lanes


def tiles_can(problem: RoutingProblem, launch: Launch) -> bool:
    """Tell whether the tiles variant serves the problem, given aligned logits."""
    spec = problem.spec
    groups, per_group = spec.num_groups, problem.num_experts // spec.num_groups
    longest = WIDEST_LIST if groups == 1 else CHUNK  # with groups, Triton 3.6 may compile lists of 16 for minutes
    tile = groups * next_power_of_two(per_group)
    return (
        spec.selection in ("logits", "scores_plus_bias", "logits_plus_bias")
        and problem.layout == "rows"
        and problem.topk + spec.shared_experts <= longest
        and not spec.topk_per_group
        and groups == next_power_of_two(groups)
        and per_group >= BEST_OF_GROUP
        and groups <= launch.lanes
        and CHUNK * launch.lanes <= tile <= MOST_SORTED * launch.lanes
    )


def can(problem: RoutingProblem, launch: Launch) -> bool:
    """Tell whether the launch serves the problem, given aligned logits and a device that its variant is for."""
    if launch.variant == "lanes":
        return True
    if launch.variant == "tiles":
        return tiles_can(problem, launch)
    return (sieve_can if launch.variant == "sieve" else rows_can)(problem, launch.lanes)


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
    if launch.variant == "sieve":
        width = CHUNK if columns <= CHUNK else WIDEST_LIST
        words = problem.num_experts // (2 * launch.lanes)
        most = max(1, min(problem.num_experts // (LEAST_GROUPS * k), words // CHUNK))
        group = max(d for d in (1, 2, 4, 8) if d <= most and words % d == 0)
        tiled = launch.lanes <= MOST_TILED and problem.num_experts == next_power_of_two(problem.num_experts)
        sieve = {"WIDTH": width, "LANES": launch.lanes, "GROUP": group, "TILED": tiled, "BLOCK_T": launch.block_t}
        return {**shared_constants(problem), **sieve}
    if launch.variant == "tiles":
        tiles = {
            "GROUPS": spec.num_groups,
            "TOPK_GROUPS": spec.topk_groups,
            "TOP2": spec.num_groups > 1 and spec.group_score == "top2_sum",
            "SIZE": next_power_of_two(problem.num_experts // spec.num_groups),
            "WIDTH": CHUNK if columns <= CHUNK else WIDEST_LIST,
            "LANES": launch.lanes,
            "BLOCK_T": launch.block_t,
        }
        return {**shared_constants(problem), **tiles}
    if launch.variant == "rows":
        width = CHUNK if columns <= CHUNK else WIDEST_LIST
        steps = -(-problem.num_experts // (CHUNK * launch.lanes))
        bits = 32 if problem.dtype == "float32" else 16
        most = MOST_UNROLLED.get((kind(spec), bits), 4)
        unroll = max(d for d in range(1, most + 1) if steps % d == 0)
        rows = {"WIDTH": width, "LANES": launch.lanes, "UNROLL": unroll, "BLOCK_T": launch.block_t}
        return {**shared_constants(problem), **rows}
    groups = spec.num_groups
    return {
        **shared_constants(problem),
        "NUM_GROUPS": groups,
        "TOPK_GROUPS": spec.topk_groups,
        "TOP2": spec.group_score == "top2_sum",
        "PER_GROUP": spec.topk_per_group,
        "JITTER": float(spec.jitter),
        "GROUPS": next_power_of_two(groups),
        "SIZE": next_power_of_two(problem.num_experts // groups),
        "N": next_power_of_two(columns),
        "UNROLL": k if k <= UNROLL_UP_TO else max(d for d in range(1, 9) if k % d == 0),
        "BLOCK_T": launch.block_t,
    }
