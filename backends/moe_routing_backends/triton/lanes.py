"""The variant for few tokens, and for every family: a few rows a program, a row's experts spread over lanes.

Tile: ``[BLOCK_T, GROUPS, SIZE]`` experts in registers, read once (E elements a row). Selection is K rounds of an integer
maximum. 16-bit logits share one uint32 with the complement of the expert's place, so one maximum (one REDUX instruction a
warp) finds the winner and breaks the tie; float32 needs two, the highest key and then the lowest place that holds it. The
exponentials of the weights are taken over the K winners. Work grows with K * E, but latency is all that counts at small T.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_routing_backends.triton.early import let_the_next_start, wait_for_kernels_in_front
from moe_routing_backends.triton.finish import store_outputs
from moe_routing_backends.triton.keys import (
    FLOAT32_MAX,
    clean,
    narrow_key,
    ordered_key,
    value_of_key,
    value_of_narrow,
)
from moe_routing_backends.triton.scores import (
    activate,
    exp_of_many,
    selected_weights,
    selection_bias,
    selection_score,
    tree_sum,
)

NOWHERE = tl.constexpr(0x7FFFFFFF)
GATHERED_UP_TO = tl.constexpr(128)
"""Experts up to which picking scales out of registers is faster than loading them."""


@triton.jit
def round_of_max(key, place):
    """Return the highest ``key [ROWS, N]`` of each row, the lowest place that holds it, and the keys without it."""
    best = tl.max(key, axis=1)
    at = tl.min(tl.where(key == best[:, None], place[None, :], NOWHERE), axis=1)
    return best, at, tl.where(place[None, :] == at[:, None], 0, key)


@triton.jit
def distinct_rounds(key, place, found, at_place, in_batch, K: tl.constexpr):
    """Fill ``found`` and ``at_place [ROWS, N]`` with the K highest of ``key`` and their places, as long as no two are equal.

    A round then needs one maximum, after which every key that holds it goes; where each stood is asked when all are known,
    which no round waits for. Return also whether some keys were equal, so that more than K are not below the last.
    """
    column = tl.arange(0, found.shape[1])
    left = key
    best = ()
    for k in tl.static_range(K):
        best += (tl.max(left, axis=1),)
        left = tl.where(left == best[k][:, None], 0, left)
    for k in tl.static_range(K):
        here = (column == k)[None, :]
        at = tl.min(tl.where(key == best[k][:, None], place[None, :], NOWHERE), axis=1)
        found = tl.where(here, best[k][:, None], found)
        at_place = tl.where(here, at[:, None], at_place)
    last = best[K - 1]
    reached = tl.sum((key >= last[:, None]).to(tl.int32), axis=1)
    equal = (reached != K) | (last == 0)
    return found, at_place, tl.max((equal & in_batch).to(tl.int32), axis=0)


@triton.jit
def best_groups(key, ROWS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, KEEP: tl.constexpr, TOP2: tl.constexpr):
    """Set the keys outside the best ``KEEP`` groups to 0; ``key [ROWS, GROUPS * SIZE]``, 0 where masked."""
    key3 = tl.reshape(key, [ROWS, GROUPS, SIZE])
    score = tl.max(key3, axis=2)
    if TOP2:
        # The best two by (key, place); a group of one expert has no second, and its score is its one.
        inside = tl.arange(0, SIZE)[None, None, :]
        first = tl.min(tl.where(key3 == score[:, :, None], inside, NOWHERE), axis=2)
        second = tl.max(tl.where(inside == first[:, :, None], 0, key3), axis=2)
        total = value_of_key(score) + tl.where(second == 0, 0.0, value_of_key(second))
        total = tl.minimum(tl.maximum(total, -FLOAT32_MAX), FLOAT32_MAX)
        score = tl.where(score == 0, 0, ordered_key(total))
    place = tl.arange(0, GROUPS)
    kept = tl.zeros([ROWS, GROUPS], tl.int32)
    for _ in tl.static_range(KEEP):
        _best, at, score = round_of_max(score, place)
        kept = tl.where(place[None, :] == at[:, None], 1, kept)
    return tl.reshape(tl.where(kept[:, :, None] != 0, key3, 0), [ROWS, GROUPS * SIZE])


@triton.jit
def best_of_each_group(key, ROWS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, EACH: tl.constexpr):
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
def route_by_rounds(
    row, logits, weights, ids, per_expert_scale, bias, token_ids, expert_table, num_valid_tokens, expert_map,
    T, valid, row_stride, expert_stride, vocabulary,
    E: tl.constexpr, K: tl.constexpr, SHARED: tl.constexpr, ROW_STRIDE: tl.constexpr, EXPERT_STRIDE: tl.constexpr,
    SCORE: tl.constexpr, SELECTION: tl.constexpr, RENORMALIZE: tl.constexpr, EPSILON: tl.constexpr, FLOOR: tl.constexpr,
    SCALE: tl.constexpr, NUM_GROUPS: tl.constexpr, TOPK_GROUPS: tl.constexpr, TOP2: tl.constexpr,
    PER_GROUP: tl.constexpr, MULTIPLIER: tl.constexpr, CAP: tl.constexpr, ZERO_EXPERTS: tl.constexpr,
    JITTER: tl.constexpr, VALID_ON_DEVICE: tl.constexpr,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, N: tl.constexpr, UNROLL: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Route ``row [BLOCK_T]``; ``GROUPS``, ``SIZE``, ``N``: groups, experts a group and columns, as powers of two."""
    in_batch = row < T
    if ROW_STRIDE:
        first = logits + row.to(tl.int64) * ROW_STRIDE
    else:
        first = logits + row.to(tl.int64) * row_stride
    place = tl.arange(0, GROUPS * SIZE)
    PER: tl.constexpr = E // NUM_GROUPS
    expert = place if NUM_GROUPS == 1 else place // SIZE * PER + place % SIZE
    exists = expert < E if NUM_GROUPS == 1 else (place % SIZE < PER) & (place // SIZE < NUM_GROUPS)
    column = tl.arange(0, N)
    is_selected = (column < K)[None, :]
    MASK: tl.constexpr = GROUPS * SIZE - 1
    NARROW: tl.constexpr = (SELECTION == "logits" and NUM_GROUPS == 1) and logits.dtype.element_ty != tl.float32
    EXACT: tl.constexpr = RENORMALIZE and (EPSILON == 0.0 and FLOOR == 0.0)
    WHOLE_ROW: tl.constexpr = SCORE == "softmax" and (not EXACT or SELECTION == "scores_plus_bias")
    highest = tl.zeros([BLOCK_T], tl.float32)
    total = highest
    # At one row a program latency is all: the scale of every expert is loaded with the logits, not after the rounds.
    GATHER: tl.constexpr = (BLOCK_T == 1 and MASK < GATHERED_UP_TO) and (NUM_GROUPS == 1 and SELECTION == "logits")
    if GATHER and per_expert_scale is not None:
        scales = tl.load(per_expert_scale + expert, mask=exists, other=0.0).to(tl.float32)

    if SELECTION != "token_table" or WHOLE_ROW:
        step = EXPERT_STRIDE if EXPERT_STRIDE else expert_stride
        raw = tl.load(first[:, None] + expert[None, :] * step, mask=in_batch[:, None] & exists[None, :], other=0.0)
        if WHOLE_ROW and SELECTION != "sparsemixer":
            x = tl.where(exists[None, :], activate(clean(raw), MULTIPLIER, CAP), -FLOAT32_MAX)
            highest = tl.max(x, axis=1)
            p = tl.where(exists[None, :], exp_of_many(x - highest[:, None]), 0.0)
            total = tree_sum(p, BLOCK_T, GROUPS * SIZE)

    if SELECTION == "token_table":
        # Nothing outside the table is read, and no entry outside [0, E) becomes an address: such rows are padding.
        token = tl.load(token_ids + row, mask=in_batch, other=-1).to(tl.int64)
        has_experts = (token >= 0) & (token < vocabulary)
        known = has_experts[:, None] & is_selected
        entry = tl.load(expert_table + token[:, None] * K + column[None, :], mask=known, other=0).to(tl.int64)
        # Compared before it is narrowed: an int64 entry of 2**32 + 3 names no expert.
        exist = (entry >= 0) & (entry < E)
        has_experts = has_experts & (tl.min(exist.to(tl.int32), axis=1) != 0)
        picked = tl.where(exist, entry, 0).to(tl.int32)
    elif NARROW:
        key = tl.where(exists[None, :], narrow_key(raw, place[None, :], MASK), 0)
        found = tl.zeros([BLOCK_T, N], tl.uint32)
        for k0 in range(0, K, UNROLL):
            for k1 in tl.static_range(UNROLL):
                best = tl.max(key, axis=1)
                found = tl.where((column == k0 + k1)[None, :], best[:, None], found)
                key = tl.where(key == best[:, None], 0, key)
        picked = tl.where(is_selected, MASK - (found & MASK).to(tl.int32), 0)
        x = activate(value_of_narrow(found, MASK), MULTIPLIER, CAP)
    else:
        l = clean(raw)
        if SELECTION == "scores_plus_bias" or SELECTION == "logits_plus_bias":
            b = selection_bias(tl.load(bias + expert, mask=exists, other=0.0), SELECTION)[None, :]
            share = tl.div_rn(1.0, total) if WHOLE_ROW else total
            t = selection_score(raw, b, highest[:, None], share[:, None], SELECTION, SCORE, MULTIPLIER, CAP)
        else:
            t = l
        key = tl.where(exists[None, :], ordered_key(t), 0)
        if PER_GROUP and NUM_GROUPS > 1:
            key = best_of_each_group(key, BLOCK_T, GROUPS, SIZE, K // NUM_GROUPS)
        elif NUM_GROUPS > 1 and not PER_GROUP:
            key = best_groups(key, BLOCK_T, GROUPS, SIZE, TOPK_GROUPS, TOP2)
        found = tl.zeros([BLOCK_T, N], tl.uint32)
        at_place = tl.zeros([BLOCK_T, N], tl.int32)
        near_share = tl.zeros([BLOCK_T, N], tl.float32)
        again = 1
        if (UNROLL == K and SELECTION != "sparsemixer") and BLOCK_T == 1:
            found, at_place, again = distinct_rounds(key, place, found, at_place, in_batch, K)
        if again != 0:
            for k0 in range(0, K, UNROLL):
                for k1 in tl.static_range(UNROLL):
                    here = (column == k0 + k1)[None, :]
                    if SELECTION == "sparsemixer":
                        m = value_of_key(tl.max(key, axis=1))[:, None]
                        far = (m - l) / tl.maximum(tl.abs(l), m) > 2.0 * JITTER
                        near = tl.where((key == 0) | far, 0.0, exp_of_many(tl.minimum(l - m, 0.0)))
                        near_share = tl.where(here, 1.0 / tree_sum(near, BLOCK_T, GROUPS * SIZE)[:, None], near_share)
                    best, at, key = round_of_max(key, place)
                    found = tl.where(here, best[:, None], found)
                    at_place = tl.where(here, at[:, None], at_place)
        picked = at_place if NUM_GROUPS == 1 else at_place // SIZE * PER + at_place % SIZE
        if SELECTION == "logits":
            x = activate(value_of_key(found), MULTIPLIER, CAP)

    if SELECTION == "token_table" or (SELECTION == "scores_plus_bias" or SELECTION == "logits_plus_bias"):
        step = EXPERT_STRIDE if EXPERT_STRIDE else expert_stride
        again = tl.load(first[:, None] + picked * step, mask=in_batch[:, None] & is_selected, other=0.0)
        x = activate(clean(again), MULTIPLIER, CAP)
    if SELECTION == "sparsemixer":
        w = near_share * SCALE if SCALE != 1.0 else near_share
    else:
        w = selected_weights(
            x, is_selected, highest, total, SCORE, RENORMALIZE, EPSILON, FLOOR, SCALE, K, BLOCK_T, N
        )  # fmt: skip
    if GATHER and per_expert_scale is not None:
        w *= tl.gather(scales[None, :], picked, 1)
    store_outputs(
        weights, ids, w, picked, row, T, valid, num_valid_tokens, None if GATHER else per_expert_scale, expert_map,
        E, K, SHARED, ZERO_EXPERTS, VALID_ON_DEVICE, N, has_experts if SELECTION == "token_table" else None,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "T",
        "valid",
        "row_stride",
        "expert_stride",
        "per_expert_scale",
        "bias",
        "token_ids",
        "expert_table",
        "num_valid_tokens",
        "expert_map",
        "vocabulary",
    ]
)
def lanes_kernel(
    logits, weights, ids, per_expert_scale, bias, token_ids, expert_table, num_valid_tokens, expert_map,
    T: tl.int32, valid: tl.int32, row_stride: tl.int64, expert_stride: tl.int64, vocabulary: tl.int32,
    E: tl.constexpr, K: tl.constexpr, SHARED: tl.constexpr, ROW_STRIDE: tl.constexpr, EXPERT_STRIDE: tl.constexpr,
    SCORE: tl.constexpr, SELECTION: tl.constexpr, RENORMALIZE: tl.constexpr, EPSILON: tl.constexpr, FLOOR: tl.constexpr,
    SCALE: tl.constexpr, NUM_GROUPS: tl.constexpr, TOPK_GROUPS: tl.constexpr, TOP2: tl.constexpr,
    PER_GROUP: tl.constexpr, MULTIPLIER: tl.constexpr, CAP: tl.constexpr, ZERO_EXPERTS: tl.constexpr,
    JITTER: tl.constexpr, VALID_ON_DEVICE: tl.constexpr, EARLY: tl.constexpr,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, N: tl.constexpr, UNROLL: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Route ``BLOCK_T`` rows."""
    let_the_next_start(EARLY)
    wait_for_kernels_in_front(EARLY)
    route_by_rounds(
        tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), logits, weights, ids, per_expert_scale, bias, token_ids,
        expert_table, num_valid_tokens, expert_map, T, valid, row_stride, expert_stride, vocabulary, E, K, SHARED,
        ROW_STRIDE, EXPERT_STRIDE, SCORE, SELECTION, RENORMALIZE, EPSILON, FLOOR, SCALE, NUM_GROUPS, TOPK_GROUPS, TOP2,
        PER_GROUP, MULTIPLIER, CAP, ZERO_EXPERTS, JITTER, VALID_ON_DEVICE, GROUPS, SIZE, N, UNROLL, BLOCK_T,
    )  # fmt: skip
