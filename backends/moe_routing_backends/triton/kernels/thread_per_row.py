"""Thread-per-row kernel, for many tokens: one thread, or a few, sorts a row in registers.

Tile: ``[BLOCK_T, THREADS_PER_ROW]`` threads. A thread reads its row in chunks of 8 experts, 16
bytes a load, and sends each chunk through a sorting network into the list of the ``WIDTH`` highest
keys. The threads of a row merge their lists at the end, so no shuffle is needed before that. Cost:
about 14 integer instructions an expert for 16-bit logits, 17 for float32.

A key has 32 bits, so that a comparator is two instructions. A 16-bit logit and the expert's index
fit exactly. Of a float32 score only the high bits fit next to the index (25 of them at E = 128), so
the list can misorder scores that share those bits. Therefore the ``WIDTH`` selected logits are read
again and sorted by exact keys. If the best key that the list left out shares the high bits of the
K-th, the block scans its rows once more for each selected expert of that bucket. Float32 logits
that were rounded to 16 bits before have no low bits to lose, and skip that scan.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from moe_routing_backends.triton.device.chunks import (
    count_of,
    either,
    exact_key,
    from_exact,
    highest_of_row,
    load_chunk,
    split8,
    sum_of_steps,
)
from moe_routing_backends.triton.device.epilogue import count_slots, store_outputs
from moe_routing_backends.triton.device.keys import (
    FLOAT32_MAX,
    exact16_key,
    truncated_key,
    value_of_exact16,
)
from moe_routing_backends.triton.device.pdl import grid_dependency_wait, launch_dependents
from moe_routing_backends.triton.device.scores import (
    activate,
    selected_weights,
    selection_bias,
    selection_score,
)
from moe_routing_backends.triton.device.sorting_networks import (
    in_columns,
    insert,
    merge16,
    merge_lists,
    over_threads,
    sort8,
)
from moe_routing_backends.triton.kernels.spec import (
    CHUNK,
    NOT_SPECIALIZED,
    WIDEST_LIST,
    Variant,
    kind,
    list_width,
    one_warp,
    selects_by_value,
)

if TYPE_CHECKING:
    from moe_routing_backends.triton.kernels.spec import Launch
    from moe_routing_registry import RoutingProblem

MOST_CHUNKS = 64
"""Chunks of a row that one thread sorts."""
MOST_UNROLLED = {("logits", 16): 16, ("logits", 32): 8}
"""Chunks of a row that are loaded before the first is sorted, by kind and bits.

The number is 4 for the others, whose code is long.
"""
FEW_PROGRAMS = tl.constexpr(264)
"""Programs, two on each multiprocessor of an H100, up to which the next kernel is placed at once.

More let it be placed late: else the programs of one kernel after another wait in the places of
those that have not begun (``docs/performance.md``, Calls in a graph).
"""


@triton.jit
def best_of_bucket(
    exact, bucket, first_column, count, first, bias, highest, share, thread, STEPS: tl.constexpr,
    WIDTH: tl.constexpr, MASK: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Fill ``count`` columns of ``exact`` with the best exact keys of a bucket, one scan a key.

    The columns are those from ``first_column`` on. A bucket is the experts whose rough keys share
    the high bits, ``bucket [ROWS]``. Rows of count 0 keep what they have.
    """
    E: tl.constexpr = SPEC.value.num_experts
    CHUNKS: tl.constexpr = E // 8
    column = tl.arange(0, WIDTH)[None, :]
    last = tl.zeros(bucket.shape, tl.uint64) - 1
    rounds = tl.max(count, axis=0)
    k = 0
    while k < rounds:
        best = tl.zeros(thread.shape, tl.uint64)
        for i in range(STEPS):
            chunk = tl.minimum(thread + i * thread.shape[1], CHUNKS - 1)
            index = (chunk * 8)[:, :, None] + tl.arange(0, 8)[None, None, :]
            raw = load_chunk(first, chunk, None)
            b = raw if bias is None else selection_bias(tl.load(bias + index), SPEC)
            t = selection_score(raw, b, highest[:, None, None], share[:, None, None], SPEC)
            key = exact_key(t, index)
            inside = ((truncated_key(t, index, MASK) | MASK) == bucket[:, None, None]) & (
                key < last[:, None, None]
            )
            best = tl.maximum(best, tl.max(tl.where(inside, key, 0), axis=2))
        last = tl.max(best, axis=1)
        exact = tl.where(
            (column == (first_column + k)[:, None]) & (k < count)[:, None], last[:, None], exact
        )
        k += 1
    return exact


@triton.jit
def exact_list(
    best, after, best_lost, dust, first, bias, highest, share, thread, is_selected,
    STEPS: tl.constexpr, WIDTH: tl.constexpr, MASK: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Return the exact keys ``[ROWS, WIDTH]`` of the selected from a list of truncated keys.

    :param best, after, best_lost: the list, and the highest key that it left out.
    :param dust: the bits of all scores of a thread, combined: truncated keys lost nothing where the
        low ones are 0.
    """
    K: tl.constexpr = SPEC.value.topk
    SELECTION: tl.constexpr = SPEC.value.selection
    ROWS: tl.constexpr = thread.shape[0]
    found = in_columns(best, after, WIDTH)
    stored = MASK - (found & MASK).to(tl.int32)
    real = found != 0
    index = tl.where(real, stored, 0)
    raw = tl.load(first[:, None] + index)
    b = raw if SELECTION == "logits" else selection_bias(tl.load(bias + index), SPEC)
    t = selection_score(raw, b, highest[:, None], share[:, None], SPEC)
    key = tl.where(real, exact_key(t, index), 0)
    # The networks take one tensor for each place of a list, so the columns are split, and put
    # together again after.
    if WIDTH == 8:
        s = sort8(split8(tl.reshape(key, [ROWS, 1, 8])))
        r = s
    else:
        low, high = tl.split(tl.permute(tl.reshape(key, [ROWS, 2, 8]), [0, 2, 1]))
        s, r = merge16(
            sort8(split8(tl.reshape(low, [ROWS, 1, 8]))),
            sort8(split8(tl.reshape(high, [ROWS, 1, 8]))),
        )
    # The networks left a dimension of one behind.
    exact = tl.reshape(in_columns(s, r, WIDTH), [ROWS, WIDTH])
    # Where the K-th of the list and the best left out share the high bits, and low bits were lost,
    # the list's experts of that bucket may be the wrong ones. The list above the bucket is right,
    # and now in exact order.
    kth = (best[K - 1] if K <= 8 else after[K - 9]) | MASK
    lost_bits = tl.reduce(dust, 1, either) & MASK
    members = count_of(((found | MASK) == kth[:, None]) & is_selected)
    unsure = tl.where((kth == (best_lost | MASK)) & (lost_bits != 0), members, 0)
    if tl.max(unsure, axis=0) != 0:
        exact = best_of_bucket(
            exact, kth, K - members, unsure, first, bias, highest, share, thread,
            STEPS, WIDTH, MASK, SPEC,
        )  # fmt: skip
    return exact


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def moe_routing_thread_per_row(
    logits, weights, ids, per_expert_scale, bias, token_ids, expert_table, num_valid_tokens,
    expert_map, counts, replica_count, most_replicas, T: tl.int32, valid: tl.int32,
    row_stride: tl.int64, expert_stride: tl.int64, vocabulary: tl.int32, SPEC: tl.constexpr,
    ROW_STRIDE: tl.constexpr, EXPERT_STRIDE: tl.constexpr, VALID_ON_DEVICE: tl.constexpr,
    PDL: tl.constexpr, WIDTH: tl.constexpr, THREADS_PER_ROW: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Route ``BLOCK_T`` rows by ``THREADS_PER_ROW`` threads each.

    E is a multiple of 8, ``K + SHARED <= WIDTH``, 8 or 16.
    """
    E: tl.constexpr = SPEC.value.num_experts
    K: tl.constexpr = SPEC.value.topk
    SCORE: tl.constexpr = SPEC.value.score
    SELECTION: tl.constexpr = SPEC.value.selection
    CAP: tl.constexpr = SPEC.value.logit_softcap
    SCALE: tl.constexpr = SPEC.value.scale
    if tl.num_programs(0) <= FEW_PROGRAMS:
        launch_dependents(PDL)
    grid_dependency_wait(PDL)
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    # Rows past the last read the last: no mask on any load.
    readable = tl.minimum(row, T - 1).to(tl.int64)
    if ROW_STRIDE:
        first = logits + readable * ROW_STRIDE
    else:
        # The launcher has checked 16 bytes.
        first = logits + tl.multiple_of(readable * row_stride, 4)
    CHUNKS: tl.constexpr = E // 8
    STEPS: tl.constexpr = (CHUNKS + THREADS_PER_ROW - 1) // THREADS_PER_ROW
    POWER: tl.constexpr = triton.next_power_of_2(STEPS)
    WHOLE: tl.constexpr = CHUNKS % THREADS_PER_ROW == 0
    EXACT16: tl.constexpr = SELECTION == "logits" and logits.dtype.element_ty != tl.float32
    MASK: tl.constexpr = triton.next_power_of_2(E) - 1
    SOFTMAX_KEYS: tl.constexpr = SCORE == "softmax" and SELECTION == "scores_plus_bias"
    WHOLE_ROW: tl.constexpr = SPEC.value.normalizes_whole_row
    thread = tl.arange(0, THREADS_PER_ROW)[None, :] + tl.zeros([BLOCK_T, 1], tl.int32)
    highest = tl.zeros([BLOCK_T], tl.float32)
    total = highest
    # Without a bias the best of the selected is the best of the row, if no soft-cap has made
    # others equal to it by rounding: one scan of the row less.
    BEST_IS_SELECTED: tl.constexpr = SELECTION == "logits" and CAP == 0.0
    if WHOLE_ROW and not BEST_IS_SELECTED:
        highest = highest_of_row(first, STEPS, CHUNKS, BLOCK_T, THREADS_PER_ROW, SPEC)
        total = sum_of_steps(first, highest, POWER, CHUNKS, BLOCK_T, THREADS_PER_ROW, SPEC)
    share = tl.div_rn(1.0, total) if SOFTMAX_KEYS else total

    lost = tl.zeros([BLOCK_T, THREADS_PER_ROW], tl.uint32)
    top = (lost, lost, lost, lost, lost, lost, lost, lost)
    rest = top
    dust = tl.zeros([BLOCK_T, THREADS_PER_ROW], tl.int32)
    for outer in range(0, STEPS, UNROLL):
        for inner in tl.static_range(UNROLL):
            chunk = thread + (outer + inner) * THREADS_PER_ROW
            known = None if WHOLE else chunk < CHUNKS
            raw = load_chunk(first, chunk, known)
            index = (chunk * 8)[:, :, None] + tl.arange(0, 8)[None, None, :]
            if EXACT16:
                key = exact16_key(raw, index, MASK)
            else:
                b = raw
                if SELECTION != "logits":
                    at = index if WHOLE else tl.minimum(index, E - 1)
                    b = selection_bias(tl.load(bias + at), SPEC)
                t = selection_score(raw, b, highest[:, None, None], share[:, None, None], SPEC)
                key = truncated_key(t, index, MASK)
                d0, d1, d2, d3, d4, d5, d6, d7 = split8(t.to(tl.int32, bitcast=True))
                dust |= (d0 | d1 | d2) | (d3 | d4 | d5) | (d6 | d7)
            if not WHOLE:
                key = tl.where(known[:, :, None], key, 0)
            top, rest, lost = insert(top, rest, lost, sort8(split8(key)), WIDTH)
    column = tl.arange(0, WIDTH)
    is_selected = (column < K)[None, :]
    best, after, best_lost = merge_lists(top, rest, lost, 1, WIDTH)
    if EXACT16:
        found = over_threads(best, after, thread, WIDTH)
        picked = tl.where(is_selected, MASK - (found & MASK).to(tl.int32), 0)
        x = activate(value_of_exact16(found, MASK), SPEC)
    else:
        exact = exact_list(
            best, after, best_lost, dust, first, bias, highest, share, thread, is_selected,
            STEPS, WIDTH, MASK, SPEC,
        )  # fmt: skip
        picked, x = from_exact(exact, is_selected, first, SPEC)
        x = activate(x, SPEC)
    if tl.num_programs(0) > FEW_PROGRAMS:
        launch_dependents(PDL)
    if counts is not None:
        count_slots(
            counts, picked, row, T, valid, num_valid_tokens, SPEC, VALID_ON_DEVICE,
        )  # fmt: skip
    if WHOLE_ROW and BEST_IS_SELECTED:
        highest = tl.max(tl.where(is_selected, x, -FLOAT32_MAX), axis=1)
        total = sum_of_steps(first, highest, POWER, CHUNKS, BLOCK_T, THREADS_PER_ROW, SPEC)
    w = selected_weights(x, is_selected, highest, total, SPEC, SCALE)
    store_outputs(
        weights, ids, w, picked, row, T, valid, num_valid_tokens, per_expert_scale, expert_map,
        replica_count, most_replicas, SPEC, VALID_ON_DEVICE,
    )  # fmt: skip


def supports(problem: RoutingProblem, launch: Launch) -> bool:
    """Serve rows of whole chunks, ``MOST_CHUNKS`` a thread at most, and lists in registers."""
    spec, experts = problem.spec, problem.num_experts
    chunks = experts // CHUNK
    return (
        selects_by_value(problem)
        and experts % CHUNK == 0
        and launch.threads_per_row <= chunks <= MOST_CHUNKS * launch.threads_per_row
        and problem.topk + spec.shared_experts <= WIDEST_LIST
        and spec.num_groups == 1
    )


def constants(problem: RoutingProblem, launch: Launch) -> dict[str, Any]:
    """Unroll as many chunks as divide a thread's share and as the code's length allows."""
    steps = -(-problem.num_experts // (CHUNK * launch.threads_per_row))
    bits = 32 if problem.dtype == "float32" else 16
    most = MOST_UNROLLED.get((kind(problem.spec), bits), 4)
    return {
        "WIDTH": list_width(problem),
        "THREADS_PER_ROW": launch.threads_per_row,
        "UNROLL": max(d for d in range(1, most + 1) if steps % d == 0),
    }


VARIANT = Variant(
    moe_routing_thread_per_row, supports, constants, partial(one_warp, "thread_per_row")
)
