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
def count_slots(counts, picked, mask):
    """Add 1 to the count of each expert ``picked`` where ``mask``."""
    one = tl.full(picked.shape, 1, counts.dtype.element_ty)
    # Sums of integers are the same in whatever order they are added.
    tl.atomic_add(counts + picked, one, mask=mask, sem="relaxed")


@triton.jit
def store_outputs(
    weights, ids, w, picked, row, T, valid, num_valid_tokens, per_expert_scale, expert_map,
    counts, SPEC: tl.constexpr, VALID_ON_DEVICE: tl.constexpr, has_expert=None,
):  # fmt: skip
    """Apply the epilogue to ``w`` and logical ids ``picked``, and store them.

    Both are ``[ROWS, N]``, of which K columns count. ``has_expert``, ``[ROWS, N]`` or ``[ROWS,
    1]``: slots that a table or a record gives an expert to; the others are blank.
    """
    E: tl.constexpr = SPEC.value.num_experts
    K: tl.constexpr = SPEC.value.topk
    SHARED: tl.constexpr = SPEC.value.shared_experts
    SHARED_WEIGHT: tl.constexpr = SPEC.value.shared_weight
    ZERO_EXPERTS: tl.constexpr = SPEC.value.zero_experts
    COUNTED: tl.constexpr = SPEC.value.counted_columns
    column = tl.arange(0, w.shape[1])[None, :]
    routed = column < K
    written = (row < T)[:, None] & (column < K + SHARED)
    if per_expert_scale is not None:
        w *= tl.load(per_expert_scale + picked, mask=written & routed, other=0.0).to(tl.float32)
    if ZERO_EXPERTS:
        w = tl.where(picked >= E - ZERO_EXPERTS, 0.0, w)
    if SHARED:
        picked = tl.where(routed, picked, E + column - K)
        w = tl.where(routed, w, SHARED_WEIGHT)
    logical = picked
    if expert_map is not None:
        picked = tl.load(expert_map + picked, mask=written, other=0)
    is_valid = is_no_padding(row, valid, num_valid_tokens, VALID_ON_DEVICE)[:, None]
    if has_expert is not None:
        is_valid = is_valid & has_expert
    if counts is not None:
        count_slots(counts, logical, written & is_valid & (column < COUNTED))
    out = row.to(tl.int64)[:, None] * (K + SHARED) + column
    tl.store(weights + out, tl.where(is_valid, w, 0.0), mask=written)
    tl.store(ids + out, tl.where(is_valid, picked, -1).to(ids.dtype.element_ty), mask=written)
