"""The gradient of the weights, by the logits and by the scale of each expert, in one kernel.

Below, ``w = SCALE * per_expert_scale[ids] * u`` and ``u`` is a score, renormalised where the spec
says so. By the logarithm of score k the gradient is ``h_k = u_k (g_k - sum(g u))``, the sum only
where renormalised, whatever epsilon and floor are: the denominator that ``u`` was divided by is in
``u`` already. What is left is the slope of the score's logarithm, or, for a softmax over the whole
row, ``-p sum(h)`` at every expert.

Tile: ``[BLOCK_T, SIZE]`` experts in registers. A program walks over rows ``BLOCK_T`` at a time and
adds up the gradient of the scale as it goes, so that each program leaves one partial sum, and the
host adds those in one fixed order: no atomics, the same bits in every run. Of a row it reads the K
chosen logits (all of them for a softmax over the row), and writes E gradients once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_routing_backends.triton.device.keys import FLOAT32_MAX, clean
from moe_routing_backends.triton.device.scores import (
    activate,
    exp_of_many,
    log_slope,
    selected_weights,
    tree_sum,
)

FLOOR_IS_REACHED = tl.constexpr(0.999999)
"""The sum of u is 1 - epsilon / denominator.

Further below what the floor would give than this, the floor was the divisor.
"""


@triton.jit
def slope_of_activation(x, SPEC: tl.constexpr):
    """Return the derivative of the activated logit ``x`` by the logit."""
    CAP: tl.constexpr = SPEC.value.logit_softcap
    MULTIPLIER: tl.constexpr = SPEC.value.logit_multiplier
    slope = x * 0.0 + MULTIPLIER
    if CAP != 0.0:
        tanh = x / CAP
        slope = slope * (1.0 - tanh * tanh)
    return slope


@triton.jit
def is_finite(raw):
    """Tell finite numbers from infinities and NaN."""
    return tl.abs(raw.to(tl.float32)) <= FLOAT32_MAX


@triton.jit(
    do_not_specialize=[
        "grad_weights", "ids", "per_expert_scale", "T", "row_stride", "expert_stride",
    ]
)  # fmt: skip
def moe_routing_backward(
    grad_weights, logits, ids, per_expert_scale, grad_logits, grad_scale, T: tl.int32,
    row_stride: tl.int64, expert_stride: tl.int64, SPEC: tl.constexpr, ROW_STRIDE: tl.constexpr,
    EXPERT_STRIDE: tl.constexpr, SIZE: tl.constexpr, N: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Go back through ``grad_weights [T, K]``.

    ``SIZE``, ``N``: experts and columns as powers of two.
    """
    E: tl.constexpr = SPEC.value.num_experts
    K: tl.constexpr = SPEC.value.topk
    SELECTION: tl.constexpr = SPEC.value.selection
    SCORE: tl.constexpr = SPEC.value.score
    RENORMALIZE: tl.constexpr = SPEC.value.renormalize
    EPSILON: tl.constexpr = SPEC.value.renorm_epsilon
    FLOOR: tl.constexpr = SPEC.value.renorm_floor
    SCALE: tl.constexpr = SPEC.value.scale
    ZERO_EXPERTS: tl.constexpr = SPEC.value.zero_experts
    MIXER: tl.constexpr = SELECTION == "sparsemixer"
    SUMS_TO_ONE: tl.constexpr = SPEC.value.sums_to_one
    JITTER: tl.constexpr = SPEC.value.jitter
    WHOLE_ROW: tl.constexpr = SCORE == "softmax" and (not SUMS_TO_ONE and not MIXER)
    step = EXPERT_STRIDE if EXPERT_STRIDE else expert_stride
    stride = ROW_STRIDE if ROW_STRIDE else row_stride
    expert = tl.arange(0, SIZE)[None, :]
    exists = expert < E
    column = tl.arange(0, N)
    is_selected = (column < K)[None, :]
    by_scale = tl.zeros([BLOCK_T, SIZE], tl.float32)
    for first_row in range(tl.program_id(0) * BLOCK_T, T, tl.num_programs(0) * BLOCK_T):
        row = first_row + tl.arange(0, BLOCK_T)
        in_batch = (row < T)[:, None]
        row = row.to(tl.int64)[:, None]
        known = in_batch & is_selected
        chosen = tl.load(ids + row * K + column[None, :], mask=known, other=-1).to(tl.int32)
        known = known & (chosen >= 0)
        grad = tl.load(grad_weights + row * K + column[None, :], mask=known, other=0.0) * SCALE
        varies = known
        if ZERO_EXPERTS:
            varies = known & (chosen < E - ZERO_EXPERTS)
            grad = tl.where(varies, grad, 0.0)
        at_chosen = tl.where(known, chosen, 0)
        grad_u = grad
        if per_expert_scale is not None:
            # A zero expert's gradient is 0 though its scale is infinite, and 0 times infinity is
            # not 0.
            grad_u = grad * tl.load(per_expert_scale + at_chosen, mask=varies, other=0.0).to(
                tl.float32
            )
        raw = tl.load(logits + row * stride + at_chosen * step, mask=known, other=0.0)
        x = activate(clean(raw), SPEC)
        if WHOLE_ROW or MIXER:
            every = tl.load(
                logits + row * stride + expert * step, mask=in_batch & exists, other=0.0
            )
        if MIXER:
            # Every round is a softmax over what the earlier ones left near its best; what is near
            # is a constant.
            l = clean(every)
            left = tl.where(exists, 1, 0) + tl.zeros([BLOCK_T, SIZE], tl.int32)
            by_logit = tl.zeros([BLOCK_T, SIZE], tl.float32)
            u = tl.zeros([BLOCK_T, N], tl.float32)
            x = clean(raw)
            for k in range(K):
                here = (column == k)[None, :]
                id_k = tl.load(ids + row * K + k, mask=in_batch, other=-1).to(tl.int32)
                top = tl.sum(tl.where(here, x, 0.0), axis=1)[:, None]
                far = (top - l) / tl.maximum(tl.abs(l), top) > 2.0 * JITTER
                near = tl.where((left == 0) | far, 0.0, exp_of_many(tl.minimum(l - top, 0.0)))
                share = 1.0 / tl.maximum(tree_sum(near), 1.0)[:, None]
                h = tl.sum(tl.where(here, grad_u, 0.0), axis=1)[:, None] * share
                by_logit += tl.where(expert == id_k, h, 0.0) - near * share * h
                u = tl.where(here, share, u)
                left = tl.where(expert == id_k, 0, left)
            by_logit = tl.where(is_finite(every), by_logit, 0.0)
        else:
            highest = tl.zeros([BLOCK_T], tl.float32)
            total = highest
            if WHOLE_ROW:
                all_x = activate(clean(every), SPEC)
                highest = tl.max(tl.where(exists, all_x, -FLOAT32_MAX), axis=1)
                p = tl.where(exists, exp_of_many(all_x - highest[:, None]), 0.0)
                total = tree_sum(p)
            # Of a recorded row some slots may have no expert.
            u = selected_weights(x, known, highest, total, SPEC, 1.0)
            through_sum = tl.zeros([BLOCK_T], tl.float32)
            if RENORMALIZE:
                through_sum = tree_sum(grad_u * u)
                if FLOOR != 0.0:
                    reached = tree_sum(u) * FLOOR + EPSILON < FLOOR * FLOOR_IS_REACHED
                    through_sum = tl.where(reached, 0.0, through_sum)
            h = u * (grad_u - through_sum[:, None])
            by_logit = tl.zeros([BLOCK_T, SIZE], tl.float32)
            if WHOLE_ROW:
                slope = slope_of_activation(all_x, SPEC)
                spread = tree_sum(h)[:, None]
                by_logit = tl.where(is_finite(every), -p / total[:, None] * spread * slope, 0.0)
            h = h * log_slope(x, SCORE) * slope_of_activation(x, SPEC)
            h = tl.where(is_finite(raw), h, 0.0)
        part = grad * u
        for k0 in range(0, K, UNROLL):
            for k1 in tl.static_range(UNROLL):
                here = (column == k0 + k1)[None, :]
                id_k = tl.load(ids + row * K + k0 + k1, mask=in_batch, other=-1).to(tl.int32)
                if not MIXER:
                    by_logit += tl.where(
                        expert == id_k, tl.sum(tl.where(here, h, 0.0), axis=1)[:, None], 0.0
                    )
                if per_expert_scale is not None:
                    by_scale += tl.where(
                        expert == id_k, tl.sum(tl.where(here, part, 0.0), axis=1)[:, None], 0.0
                    )
        to_logits = grad_logits + row * E + expert
        tl.store(to_logits, by_logit.to(grad_logits.dtype.element_ty), mask=in_batch & exists)
    if per_expert_scale is not None:
        to_scale = grad_scale + tl.program_id(0) * E + tl.arange(0, SIZE)
        tl.store(to_scale, tl.sum(by_scale, axis=0), mask=tl.arange(0, SIZE) < E)
