"""The kernel for recorded ids: rows that have a record are weighed, the others are routed.

Tile: ``[BLOCK_T, N]`` slots. A row with a record needs no selection: K of its logits are gathered,
which reads about as many bytes as whole rows would, and softmax over all experts reads the row too.
Programs are one warp, and take several rows where there are many: a warp waits for its record,
then for the logits, and slots in flight hide both. A row without a record is routed by itself, by
exact rounds, as the cooperative kernel does it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from moe_routing_backends.triton.device.epilogue import count_slots, is_no_padding, store_outputs
from moe_routing_backends.triton.device.keys import FLOAT32_MAX, clean
from moe_routing_backends.triton.device.pdl import grid_dependency_wait, launch_dependents
from moe_routing_backends.triton.device.scores import (
    activate,
    exp_of_many,
    selected_weights,
    tree_sum,
)
from moe_routing_backends.triton.kernels import cooperative
from moe_routing_backends.triton.kernels.cooperative import experts_of, from_record, route_by_rounds
from moe_routing_backends.triton.kernels.spec import NOT_SPECIALIZED, Launch, Variant, kernel_spec

if TYPE_CHECKING:
    from moe_routing_registry import DeviceInfo, RoutingProblem

MOST_ROWS = 8
"""Rows a program, with which few programs of many tokens wait for a place."""
MOST_ELEMENTS = 1024
"""Logits of a program that sums up whole rows: 32 in each thread."""
ROWS = ((1024, 1), (8192, 4), (math.inf, MOST_ROWS))
"""Tokens up to which a program takes so many rows. Analytical, not measured."""


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def moe_routing_weigh(
    logits, weights, ids, per_expert_scale, bias, token_ids, expert_table, num_valid_tokens,
    expert_map, counts, replica_count, most_replicas, T: tl.int32, valid: tl.int32,
    row_stride: tl.int64, expert_stride: tl.int64, vocabulary: tl.int32, SPEC: tl.constexpr,
    ROW_STRIDE: tl.constexpr, EXPERT_STRIDE: tl.constexpr, VALID_ON_DEVICE: tl.constexpr,
    PDL: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, N: tl.constexpr,
    UNROLL: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Weigh the experts of ``BLOCK_T`` rows, which ``expert_table [T, K]`` has recorded."""
    K: tl.constexpr = SPEC.value.topk
    SCORE: tl.constexpr = SPEC.value.score
    SCALE: tl.constexpr = SPEC.value.scale
    SUMS_TO_ONE: tl.constexpr = SPEC.value.sums_to_one
    launch_dependents(PDL)
    grid_dependency_wait(PDL)
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_batch = row < T
    if ROW_STRIDE:
        first = logits + row.to(tl.int64) * ROW_STRIDE
    else:
        first = logits + row.to(tl.int64) * row_stride
    step = EXPERT_STRIDE if EXPERT_STRIDE else expert_stride
    column = tl.arange(0, N)
    picked, has_expert, has_record = from_record(expert_table, row, in_batch, column, SPEC)
    is_selected = (column < K)[None, :] & has_expert
    of_picked = tl.load(
        first[:, None] + picked * step, mask=in_batch[:, None] & is_selected, other=0.0
    )
    # Padding without a record needs no routing.
    is_token = in_batch & is_no_padding(row, valid, num_valid_tokens, VALID_ON_DEVICE)
    is_usual = is_token & (has_record == 0)
    its_row = tl.where(is_usual, T, row)
    if counts is not None:
        count_slots(
            counts, picked, its_row, T, valid, num_valid_tokens, SPEC, VALID_ON_DEVICE, has_expert,
        )  # fmt: skip
    x = activate(clean(of_picked), SPEC)
    highest = tl.zeros([BLOCK_T], tl.float32)
    total = highest
    if SCORE == "softmax" and not SUMS_TO_ONE:
        # In the places in which the other kernels sum: groups may be padded.
        _, expert, there = experts_of(GROUPS, SIZE, SPEC)
        exists = there[None, :]
        raw = tl.load(
            first[:, None] + expert[None, :] * step, mask=in_batch[:, None] & exists, other=0.0
        )
        every = tl.where(exists, activate(clean(raw), SPEC), -FLOAT32_MAX)
        highest = tl.max(every, axis=1)
        total = tree_sum(tl.where(exists, exp_of_many(every - highest[:, None]), 0.0))
    w = selected_weights(x, is_selected, highest, total, SPEC, SCALE)
    store_outputs(
        weights, ids, w, picked, its_row, T, valid, num_valid_tokens, per_expert_scale, expert_map,
        replica_count, most_replicas, SPEC, VALID_ON_DEVICE, has_expert,
    )  # fmt: skip
    if tl.max(is_usual.to(tl.int32), axis=0) != 0:
        for i in range(BLOCK_T):
            here = tl.arange(0, BLOCK_T) == i
            if tl.max((here & is_usual).to(tl.int32), axis=0) != 0:
                route_by_rounds(
                    tl.program_id(0) * BLOCK_T + i + tl.arange(0, 1), logits, weights, ids,
                    per_expert_scale, bias, None, None, num_valid_tokens, expert_map, counts,
                    replica_count, most_replicas, T, valid, row_stride, expert_stride, 0, SPEC,
                    ROW_STRIDE, EXPERT_STRIDE, VALID_ON_DEVICE, GROUPS, SIZE, N, UNROLL, 1,
                )  # fmt: skip


def supports(problem: RoutingProblem, launch: Launch) -> bool:
    """Serve every problem with recorded ids."""
    return "ids" in problem.operands


def launches(problem: RoutingProblem) -> list[tuple[float, Launch]]:
    """Return the launches by rising number of tokens; the last has no end."""
    most = MOST_ROWS
    if problem.spec.score == "softmax" and not kernel_spec(problem).sums_to_one:
        tile = cooperative.constants(problem, Launch("weigh", 1, 1, 1))
        most = max(1, min(most, MOST_ELEMENTS // (tile["GROUPS"] * tile["SIZE"])))
    return [(tokens, Launch("weigh", min(rows, most), 1, 1)) for tokens, rows in ROWS]


def candidates(_device: DeviceInfo) -> list[Launch]:
    """Return nothing: ``launches`` is a rule, and tables do not name this kernel."""
    return []


VARIANT = Variant(moe_routing_weigh, supports, cooperative.constants, candidates)
