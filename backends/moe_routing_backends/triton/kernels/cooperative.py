"""Cooperative kernel, for few tokens and for every family.

The threads of a program share a few rows.

Tile: ``[BLOCK_T, GROUPS, SIZE]`` experts in registers, read once (E elements a row). Selection is K
rounds of an integer maximum. A 16-bit logit shares one uint32 with the complement of the expert's
index, so that one maximum (one REDUX instruction a warp) finds the best expert and breaks the tie.
Float32 needs two: the highest key, then the lowest index that holds it. The exponentials of the
weights are computed for the K selected experts only. Work grows with K * E, but at small T latency
is all that counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from moe_routing_backends.triton.device.epilogue import count_slots, physical_ids, store_outputs
from moe_routing_backends.triton.device.keys import (
    FLOAT32_MAX,
    clean,
    exact16_key,
    ordered_key,
    value_of_exact16,
    value_of_key,
)
from moe_routing_backends.triton.device.pdl import grid_dependency_wait, launch_dependents
from moe_routing_backends.triton.device.scores import (
    activate,
    exp_of_many,
    selected_weights,
    selection_bias,
    selection_score,
    tree_sum,
)
from moe_routing_backends.triton.kernels.spec import (
    NOT_SPECIALIZED,
    UNROLL_UP_TO,
    Launch,
    Variant,
    next_power_of_two,
)

if TYPE_CHECKING:
    from moe_routing_registry import DeviceInfo, RoutingProblem

NOWHERE = tl.constexpr(0x7FFFFFFF)
GATHERED_UP_TO = tl.constexpr(128)
"""Experts up to which picking scales out of registers is faster than loading them."""
RENAMED_UP_TO = tl.constexpr(256)
"""Likewise the replicas of experts."""
LONG_FROM = tl.constexpr(512)
"""Experts from which a program takes long, but where logits alone select."""
MOST_LONG = tl.constexpr(396)
"""Long programs, three on each multiprocessor of an H100, with which the next kernel may wait."""
SHAPES = ((1, 1), (2, 1), (4, 1), (4, 4), (8, 4), (16, 4))
"""Rows a program, and warps."""


@triton.jit
def experts_of(GROUPS: tl.constexpr, SIZE: tl.constexpr, SPEC: tl.constexpr):
    """Return the places of a tile's columns, their experts, and which of these exist.

    Each is ``[GROUPS * SIZE]``: of groups and experts a group, both padded to powers of two.
    """
    E: tl.constexpr = SPEC.value.num_experts
    NUM_GROUPS: tl.constexpr = SPEC.value.num_groups
    PER: tl.constexpr = E // NUM_GROUPS
    index = tl.arange(0, GROUPS * SIZE)
    expert = index if NUM_GROUPS == 1 else index // SIZE * PER + index % SIZE
    exists = expert < E if NUM_GROUPS == 1 else (index % SIZE < PER) & (index // SIZE < NUM_GROUPS)
    return index, expert, exists


@triton.jit
def round_of_max(key, index):
    """Return the highest ``key [ROWS, N]`` of each row, its lowest index, and the other keys."""
    best = tl.max(key, axis=1)
    at = tl.min(tl.where(key == best[:, None], index[None, :], NOWHERE), axis=1)
    return best, at, tl.where(index[None, :] == at[:, None], 0, key)


@triton.jit
def distinct_rounds(key, index, found, at_index, in_batch, K: tl.constexpr):
    """Find the K highest keys of each row and their indices, as long as no two are equal.

    They are filled into ``found`` and ``at_index [ROWS, N]``. A round needs one maximum, after
    which every key that holds it goes; where each stood is asked when all are known, which no round
    waits for. Return also whether some keys were equal, so that more than K are not below the last.
    """
    column = tl.arange(0, found.shape[1])
    left = key
    best = ()
    for k in tl.static_range(K):
        best += (tl.max(left, axis=1),)
        left = tl.where(left == best[k][:, None], 0, left)
    for k in tl.static_range(K):
        here = (column == k)[None, :]
        at = tl.min(tl.where(key == best[k][:, None], index[None, :], NOWHERE), axis=1)
        found = tl.where(here, best[k][:, None], found)
        at_index = tl.where(here, at[:, None], at_index)
    last = best[K - 1]
    reached = tl.sum((key >= last[:, None]).to(tl.int32), axis=1)
    equal = (reached != K) | (last == 0)
    return found, at_index, tl.max((equal & in_batch).to(tl.int32), axis=0)


@triton.jit
def best_groups(
    key, ROWS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, SPEC: tl.constexpr
):
    """Set the keys outside the best groups to 0; ``key [ROWS, GROUPS * SIZE]``, 0 where masked."""
    KEEP: tl.constexpr = SPEC.value.topk_groups
    TOP2: tl.constexpr = SPEC.value.sums_best_two
    # Experts of a group lie next to each other, so this moves nothing.
    key3 = tl.reshape(key, [ROWS, GROUPS, SIZE])
    score = tl.max(key3, axis=2)
    if TOP2:
        # The best two by (key, index); a group of one expert has no second, and its score is its
        # one.
        inside = tl.arange(0, SIZE)[None, None, :]
        first = tl.min(tl.where(key3 == score[:, :, None], inside, NOWHERE), axis=2)
        second = tl.max(tl.where(inside == first[:, :, None], 0, key3), axis=2)
        total = value_of_key(score) + tl.where(second == 0, 0.0, value_of_key(second))
        total = tl.minimum(tl.maximum(total, -FLOAT32_MAX), FLOAT32_MAX)
        score = tl.where(score == 0, 0, ordered_key(total))
    index = tl.arange(0, GROUPS)
    kept = tl.zeros([ROWS, GROUPS], tl.int32)
    for _ in tl.static_range(KEEP):
        _best, at, score = round_of_max(score, index)
        kept = tl.where(index[None, :] == at[:, None], 1, kept)
    return tl.reshape(tl.where(kept[:, :, None] != 0, key3, 0), [ROWS, GROUPS * SIZE])


@triton.jit
def best_of_each_group(
    key, ROWS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, EACH: tl.constexpr
):
    """Set every key but the best ``EACH`` of each group to 0."""
    key3 = tl.reshape(key, [ROWS, GROUPS, SIZE])
    inside = tl.arange(0, SIZE)[None, None, :]
    left = key3
    for _ in range(EACH):
        best = tl.max(left, axis=2)
        at = tl.min(tl.where(left == best[:, :, None], inside, NOWHERE), axis=2)
        left = tl.where(inside == at[:, :, None], 0, left)
    return tl.reshape(tl.where(left == 0, key3, 0), [ROWS, GROUPS * SIZE])


@triton.jit
def from_token_table(
    token_ids, expert_table, row, in_batch, column, vocabulary, SPEC: tl.constexpr
):
    """Look up the experts of each token: ids ``[ROWS, N]``, and which rows have any.

    Nothing outside the table is read, and no entry outside [0, E) becomes an address: such rows are
    padding.
    """
    E: tl.constexpr = SPEC.value.num_experts
    K: tl.constexpr = SPEC.value.topk
    token = tl.load(token_ids + row, mask=in_batch, other=-1).to(tl.int64)
    has_experts = (token >= 0) & (token < vocabulary)
    known = has_experts[:, None] & (column < K)[None, :]
    entry = tl.load(expert_table + token[:, None] * K + column[None, :], mask=known, other=0).to(
        tl.int64
    )
    # Compared before it is narrowed: an int64 entry of 2**32 + 3 names no expert.
    exist = (entry >= 0) & (entry < E)
    has_experts = has_experts & (tl.min(exist.to(tl.int32), axis=1) != 0)
    return tl.where(exist, entry, 0).to(tl.int32), has_experts


@triton.jit
def from_record(recorded, row, in_batch, column, SPEC: tl.constexpr):
    """Look up the recorded experts of each token: ids ``[ROWS, N]``, 0 where there is none.

    Return also which slots ``[ROWS, N]`` have an expert, those of shared experts among them, and
    which rows ``[ROWS]`` have a record: not those of -1. A row with an entry outside [-1, E) is
    padding, in the columns of shared experts too.
    """
    E: tl.constexpr = SPEC.value.num_experts
    K: tl.constexpr = SPEC.value.topk
    routed = (column < K)[None, :]
    asked = in_batch[:, None] & routed
    entry = tl.load(recorded + row.to(tl.int64)[:, None] * K + column[None, :], mask=asked)
    # Widened before it is compared, as a table's; and before it is -1, which uint8 has not.
    entry = tl.where(asked, entry.to(tl.int64), -1)
    exists = (entry >= 0) & (entry < E)
    has_record = tl.max((entry != -1).to(tl.int32), axis=1) != 0
    is_wrong = tl.max(((entry < -1) | (entry >= E)).to(tl.int32), axis=1)[:, None] != 0
    has_expert = tl.where(routed, exists, True) & (is_wrong == 0)
    return tl.where(exists, entry, 0).to(tl.int32), has_expert, has_record


@triton.jit
def rounds_of_exact16(key, column, K: tl.constexpr, UNROLL: tl.constexpr):
    """Return the K highest of keys ``[ROWS, N]`` of which no two are equal: one maximum a round."""
    found = tl.zeros([key.shape[0], column.shape[0]], tl.uint32)
    for k0 in range(0, K, UNROLL):
        for k1 in tl.static_range(UNROLL):
            best = tl.max(key, axis=1)
            found = tl.where((column == k0 + k1)[None, :], best[:, None], found)
            key = tl.where(key == best[:, None], 0, key)
    return found


@triton.jit
def rounds_of_keys(key, l, index, column, in_batch, UNROLL: tl.constexpr, SPEC: tl.constexpr):
    """Return the K highest keys of each row, their indices, and the weights of sparsemixer.

    Each is ``[ROWS, N]``.

    :param l: the clean logits, which sparsemixer's weights are computed from, round by round.
    """
    K: tl.constexpr = SPEC.value.topk
    SELECTION: tl.constexpr = SPEC.value.selection
    SPARSEMIXER: tl.constexpr = SELECTION == "sparsemixer"
    JITTER: tl.constexpr = SPEC.value.jitter
    ROWS: tl.constexpr = key.shape[0]
    N: tl.constexpr = column.shape[0]
    found = tl.zeros([ROWS, N], tl.uint32)
    at_index = tl.zeros([ROWS, N], tl.int32)
    near_share = tl.zeros([ROWS, N], tl.float32)
    is_left = 1
    if (UNROLL == K and not SPARSEMIXER) and ROWS == 1:
        found, at_index, is_left = distinct_rounds(key, index, found, at_index, in_batch, K)
    if is_left != 0:
        for k0 in range(0, K, UNROLL):
            for k1 in tl.static_range(UNROLL):
                here = (column == k0 + k1)[None, :]
                if SPARSEMIXER:
                    m = value_of_key(tl.max(key, axis=1))[:, None]
                    far = (m - l) / tl.maximum(tl.abs(l), m) > 2.0 * JITTER
                    near = tl.where((key == 0) | far, 0.0, exp_of_many(tl.minimum(l - m, 0.0)))
                    near_share = tl.where(here, 1.0 / tree_sum(near)[:, None], near_share)
                best, at, key = round_of_max(key, index)
                found = tl.where(here, best[:, None], found)
                at_index = tl.where(here, at[:, None], at_index)
    return found, at_index, near_share


@triton.jit
def route_by_rounds(
    row, logits, weights, ids, per_expert_scale, bias, token_ids, expert_table, num_valid_tokens,
    expert_map, counts, replica_count, most_replicas, T, valid, row_stride, expert_stride,
    vocabulary, SPEC: tl.constexpr, ROW_STRIDE: tl.constexpr, EXPERT_STRIDE: tl.constexpr,
    VALID_ON_DEVICE: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, N: tl.constexpr,
    UNROLL: tl.constexpr, BLOCK_T: tl.constexpr, given=None,
):  # fmt: skip
    """Route ``row [BLOCK_T]``.

    ``GROUPS``, ``SIZE``, ``N``: groups, experts a group and columns, as powers of two. ``given
    [BLOCK_T, GROUPS * SIZE]``: logits in registers, which are routed in place of those in memory.
    ``expert_table``: of a spec without a table, recorded ids ``[T, K]``. Returns what
    ``store_outputs`` does.
    """
    E: tl.constexpr = SPEC.value.num_experts
    K: tl.constexpr = SPEC.value.topk
    SHARED: tl.constexpr = SPEC.value.shared_experts
    SELECTION: tl.constexpr = SPEC.value.selection
    NUM_GROUPS: tl.constexpr = SPEC.value.num_groups
    PER_GROUP: tl.constexpr = SPEC.value.topk_per_group
    SCALE: tl.constexpr = SPEC.value.scale
    in_batch = row < T
    if given is None:
        if ROW_STRIDE:
            first = logits + row.to(tl.int64) * ROW_STRIDE
        else:
            first = logits + row.to(tl.int64) * row_stride
    DTYPE: tl.constexpr = logits.dtype.element_ty if given is None else given.dtype
    index, expert, exists = experts_of(GROUPS, SIZE, SPEC)
    PER: tl.constexpr = E // NUM_GROUPS
    column = tl.arange(0, N)
    is_selected = (column < K)[None, :]
    MASK: tl.constexpr = GROUPS * SIZE - 1
    EXACT16: tl.constexpr = (SELECTION == "logits" and NUM_GROUPS == 1) and tl.float32 != DTYPE
    WHOLE_ROW: tl.constexpr = SPEC.value.normalizes_whole_row
    REPLAYED: tl.constexpr = SELECTION != "token_table" and expert_table is not None
    highest = tl.zeros([BLOCK_T], tl.float32)
    total = highest
    # At one row a program latency is all: the scale of every expert is loaded with the logits, not
    # after the rounds.
    GATHER: tl.constexpr = (BLOCK_T == 1 and MASK < GATHERED_UP_TO) and (
        NUM_GROUPS == 1 and SELECTION == "logits"
    )
    if GATHER and per_expert_scale is not None:
        scales = tl.load(per_expert_scale + expert, mask=exists, other=0.0).to(tl.float32)
    # Likewise the replica of every expert, which takes two loads, one after the other; where groups
    # are padded, an expert's place is not its id.
    RENAMES: tl.constexpr = (BLOCK_T == 1 and MASK < RENAMED_UP_TO) and (
        (NUM_GROUPS == 1 or GROUPS * SIZE == E) and SHARED == 0
    )
    if RENAMES and replica_count is not None:
        physical = physical_ids(expert, row, exists, expert_map, replica_count, most_replicas)

    step = EXPERT_STRIDE if EXPERT_STRIDE else expert_stride
    if SELECTION != "token_table" or WHOLE_ROW:
        if given is None:
            raw = tl.load(
                first[:, None] + expert[None, :] * step,
                mask=in_batch[:, None] & exists[None, :],
                other=0.0,
            )
        else:
            raw = given
        if WHOLE_ROW and SELECTION != "sparsemixer":
            x = tl.where(exists[None, :], activate(clean(raw), SPEC), -FLOAT32_MAX)
            highest = tl.max(x, axis=1)
            p = tl.where(exists[None, :], exp_of_many(x - highest[:, None]), 0.0)
            total = tree_sum(p)

    if SELECTION == "token_table":
        picked, has_experts = from_token_table(
            token_ids, expert_table, row, in_batch, column, vocabulary, SPEC
        )
        has_expert = has_experts[:, None]
    elif EXACT16:
        key = tl.where(exists[None, :], exact16_key(raw, index[None, :], MASK), 0)
        found = rounds_of_exact16(key, column, K, UNROLL)
        picked = tl.where(is_selected, MASK - (found & MASK).to(tl.int32), 0)
        x = activate(value_of_exact16(found, MASK), SPEC)
    else:
        l = clean(raw)
        if SELECTION == "scores_plus_bias" or SELECTION == "logits_plus_bias":
            b = selection_bias(tl.load(bias + expert, mask=exists, other=0.0), SPEC)[None, :]
            share = tl.div_rn(1.0, total) if WHOLE_ROW else total
            t = selection_score(raw, b, highest[:, None], share[:, None], SPEC)
        else:
            t = l
        key = tl.where(exists[None, :], ordered_key(t), 0)
        if PER_GROUP and NUM_GROUPS > 1:
            key = best_of_each_group(key, BLOCK_T, GROUPS, SIZE, K // NUM_GROUPS)
        elif NUM_GROUPS > 1 and not PER_GROUP:
            key = best_groups(key, BLOCK_T, GROUPS, SIZE, SPEC)
        found, at_index, near_share = rounds_of_keys(key, l, index, column, in_batch, UNROLL, SPEC)
        picked = at_index if NUM_GROUPS == 1 else at_index // SIZE * PER + at_index % SIZE
        if SELECTION == "logits":
            x = activate(value_of_key(found), SPEC)

    if REPLAYED:
        weighed, has_expert, has_record = from_record(expert_table, row, in_batch, column, SPEC)
        picked = tl.where(has_record[:, None], weighed, picked)
        has_expert = has_expert | (has_record == 0)[:, None]
        is_selected = is_selected & has_expert
    WEIGHED_LATER: tl.constexpr = REPLAYED or (SELECTION != "logits" and SELECTION != "sparsemixer")
    if WEIGHED_LATER:
        if given is None:
            of_picked = tl.load(
                first[:, None] + picked * step, mask=in_batch[:, None] & is_selected, other=0.0
            )
        else:
            # Where groups are padded, an expert's place is not its id.
            at = picked if NUM_GROUPS == 1 else picked // PER * SIZE + picked % PER
            of_picked = tl.gather(given, at, 1)
    HAS_EMPTY: tl.constexpr = REPLAYED or SELECTION == "token_table"
    if counts is not None:
        count_slots(
            counts, picked, row, T, valid, num_valid_tokens, SPEC, VALID_ON_DEVICE,
            has_expert if HAS_EMPTY else None,
        )  # fmt: skip
    if WEIGHED_LATER:
        x = activate(clean(of_picked), SPEC)
    if SELECTION == "sparsemixer":
        w = near_share * SCALE if SCALE != 1.0 else near_share
    else:
        w = selected_weights(x, is_selected, highest, total, SPEC, SCALE)
    if GATHER and per_expert_scale is not None:
        # The scales are in registers already; a load would wait for the rounds.
        w *= tl.gather(scales[None, :], picked, 1)
    renamed = None
    if RENAMES and replica_count is not None:
        renamed = tl.gather(physical[None, :], picked, 1)
    return store_outputs(
        weights, ids, w, picked, row, T, valid, num_valid_tokens,
        None if GATHER else per_expert_scale, expert_map, replica_count, most_replicas, SPEC,
        VALID_ON_DEVICE, has_expert if HAS_EMPTY else None, renamed,
    )  # fmt: skip


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def moe_routing_cooperative(
    logits, weights, ids, per_expert_scale, bias, token_ids, expert_table, num_valid_tokens,
    expert_map, counts, replica_count, most_replicas, T: tl.int32, valid: tl.int32,
    row_stride: tl.int64, expert_stride: tl.int64, vocabulary: tl.int32, SPEC: tl.constexpr,
    ROW_STRIDE: tl.constexpr, EXPERT_STRIDE: tl.constexpr, VALID_ON_DEVICE: tl.constexpr,
    PDL: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, N: tl.constexpr,
    UNROLL: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Route ``BLOCK_T`` rows."""
    # Many long programs are slower among programs of the next kernel that wait in their places: of
    # 512 experts in groups, an H100 routes 365 to 3,000 rows 5 to 34 % faster without.
    SELECTION: tl.constexpr = SPEC.value.selection
    SPEC_GROUPS: tl.constexpr = SPEC.value.num_groups
    BY_LOGITS: tl.constexpr = SELECTION == "logits" and SPEC_GROUPS == 1
    LONG: tl.constexpr = GROUPS * SIZE >= LONG_FROM and not BY_LOGITS
    if LONG:
        if tl.num_programs(0) <= MOST_LONG:
            launch_dependents(PDL)
    else:
        launch_dependents(PDL)
    grid_dependency_wait(PDL)
    route_by_rounds(
        tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), logits, weights, ids, per_expert_scale,
        bias, token_ids, expert_table, num_valid_tokens, expert_map, counts, replica_count,
        most_replicas, T, valid, row_stride, expert_stride, vocabulary, SPEC, ROW_STRIDE,
        EXPERT_STRIDE, VALID_ON_DEVICE, GROUPS, SIZE, N, UNROLL, BLOCK_T,
    )  # fmt: skip


def supports(problem: RoutingProblem, launch: Launch) -> bool:
    """Serve every problem."""
    return True


def constants(problem: RoutingProblem, launch: Launch) -> dict[str, Any]:
    """Pad groups, the experts of a group, and columns to powers of two.

    Unroll the rounds as far as code stays short.
    """
    spec, k = problem.spec, problem.topk
    return {
        "GROUPS": next_power_of_two(spec.num_groups),
        "SIZE": next_power_of_two(problem.num_experts // spec.num_groups),
        "N": next_power_of_two(k + spec.shared_experts),
        "UNROLL": k if k <= UNROLL_UP_TO else max(d for d in range(1, 9) if k % d == 0),
    }


def candidates(device: DeviceInfo) -> list[Launch]:
    """Return launches from one row a program to 16, in one warp and in four."""
    return [Launch("cooperative", block_t, 1, warps) for block_t, warps in SHAPES]


VARIANT = Variant(moe_routing_cooperative, supports, constants, candidates)
