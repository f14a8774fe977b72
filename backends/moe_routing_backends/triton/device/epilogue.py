"""The last steps that all variants share.

These are the scale by expert, shared slots, counts, physical ids, padding and stores.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def is_no_padding(row, valid, num_valid_tokens, VALID_ON_DEVICE: tl.constexpr):
    """Tell which rows are tokens.

    How many are is a number, or stands on the device; or a mask there says which. With a mask
    ``valid`` is T.
    """
    if VALID_ON_DEVICE:
        if num_valid_tokens.dtype.element_ty == tl.int1:
            return tl.load(num_valid_tokens + row, mask=row < valid, other=0)
        else:
            return row < tl.load(num_valid_tokens)
    else:
        return row < valid


@triton.jit
def physical_ids(picked, row, mask, expert_map, replica_count, most_replicas):
    """Return the physical ids of logical experts, 0 where not ``mask``.

    :param row: numbers of rows, which broadcast with ``picked``.
    :param expert_map: with a ``replica_count``, the table of replicas, ``most_replicas`` a row:
        fewer than 2**31 elements.
    """
    if replica_count is not None:
        count = tl.load(replica_count + picked, mask=mask, other=1)
        # Clamped before it is narrowed: nothing is read outside the table.
        count = tl.minimum(tl.maximum(count, 1), most_replicas).to(tl.uint32)
        # Unsigned numbers of 32 bits: their remainder takes half the instructions of signed ones,
        # and the address of a place in the table six fewer than with 64 bits.
        turn = row.to(tl.uint32) % count
        picked = picked.to(tl.uint32) * most_replicas.to(tl.uint32) + turn
    return tl.load(expert_map + picked, mask=mask, other=0)


@triton.jit
def logical_ids(picked, column, SPEC: tl.constexpr):
    """Return the logical ids of all columns: those of shared experts follow the selected ones."""
    E: tl.constexpr = SPEC.value.num_experts
    K: tl.constexpr = SPEC.value.topk
    return tl.where(column < K, picked, E + column - K) if SPEC.value.shared_experts else picked


@triton.jit
def count_slots(
    counts, picked, row, T, valid, num_valid_tokens, SPEC: tl.constexpr,
    VALID_ON_DEVICE: tl.constexpr, has_expert=None,
):  # fmt: skip
    """Add the slots of selected experts ``picked [ROWS, N]`` to the counts.

    Kernels do this as soon as they know the experts, ahead of the weights: memory adds meanwhile.

    :param has_expert: as for ``store_outputs``.
    """
    column = tl.arange(0, picked.shape[1])[None, :]
    counted = (row < T)[:, None] & (column < SPEC.value.counted_columns)
    counted = counted & is_no_padding(row, valid, num_valid_tokens, VALID_ON_DEVICE)[:, None]
    if has_expert is not None:
        counted = counted & has_expert
    one = tl.full(picked.shape, 1, counts.dtype.element_ty)
    # Sums of integers are the same in whatever order they are added.
    at = counts + logical_ids(picked, column, SPEC)
    tl.atomic_add(at, one, mask=counted, sem="relaxed")


@triton.jit
def store_outputs(
    weights, ids, w, picked, row, T, valid, num_valid_tokens, per_expert_scale, expert_map,
    replica_count, most_replicas, SPEC: tl.constexpr, VALID_ON_DEVICE: tl.constexpr,
    has_expert=None, renamed=None,
):  # fmt: skip
    """Apply the epilogue to ``w`` and logical ids ``picked``, and store them.

    Both are ``[ROWS, N]``, of which K columns count. ``has_expert``, ``[ROWS, N]`` or ``[ROWS,
    1]``: slots that a table or a record gives an expert to; the others are blank. ``renamed``: the
    physical ids, if they are known.

    :returns: the ids as stored, -1 in columns that are not.
    """
    E: tl.constexpr = SPEC.value.num_experts
    K: tl.constexpr = SPEC.value.topk
    SHARED: tl.constexpr = SPEC.value.shared_experts
    SHARED_WEIGHT: tl.constexpr = SPEC.value.shared_weight
    ZERO_EXPERTS: tl.constexpr = SPEC.value.zero_experts
    column = tl.arange(0, w.shape[1])[None, :]
    routed = column < K
    written = (row < T)[:, None] & (column < K + SHARED)
    if per_expert_scale is not None:
        w *= tl.load(per_expert_scale + picked, mask=written & routed, other=0.0).to(tl.float32)
    if ZERO_EXPERTS:
        w = tl.where(picked >= E - ZERO_EXPERTS, 0.0, w)
    if SHARED:
        w = tl.where(routed, w, SHARED_WEIGHT)
    picked = logical_ids(picked, column, SPEC)
    if renamed is not None:
        picked = renamed
    elif expert_map is not None:
        picked = physical_ids(
            picked, row[:, None], written, expert_map, replica_count, most_replicas
        )
    is_valid = is_no_padding(row, valid, num_valid_tokens, VALID_ON_DEVICE)[:, None]
    if has_expert is not None:
        is_valid = is_valid & has_expert
    out = row.to(tl.int64)[:, None] * (K + SHARED) + column
    tl.store(weights + out, tl.where(is_valid, w, 0.0), mask=written)
    stored = tl.where(is_valid, picked, -1).to(ids.dtype.element_ty)
    tl.store(ids + out, stored, mask=written)
    return tl.where(written, stored, -1)
