"""The baseline to beat: a Triton kernel that sorts whole rows.

Each program sorts the int64 keys of one row with one warp, as the published Gemma4 kernel does.
This module imports triton, so it is imported only when a GPU is measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    import torch


@triton.jit
def empty_kernel():  # noqa: ANN201, D103 -- a kernel: what a launch alone takes
    pass


@triton.jit
def full_sort_kernel(  # noqa: ANN201, D103, PLR0913, PLR0917 -- a kernel
    logits, scale, weights, ids,  # noqa: ANN001 -- likewise
    E: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, SIZE)
    l = tl.load(logits + row * E + expert, mask=expert < E, other=-float("inf")).to(tl.float32)
    bits = l.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = (ordered.to(tl.int64) << 32) | (0xFFFF - expert).to(tl.int64)
    key = tl.sort(key, descending=True)
    value = (key >> 32).to(tl.int32)
    value = (value ^ ((value >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    picked = 0xFFFF - (key & 0xFFFF).to(tl.int32)
    selected = expert < K
    e = tl.where(selected, tl.exp(value - tl.max(value, axis=0)), 0.0)
    w = e / tl.sum(e, axis=0) * tl.load(scale + picked, mask=selected, other=0.0)
    tl.store(ids + row * K + expert, picked, mask=selected)
    tl.store(weights + row * K + expert, w, mask=selected)


def full_sort(
    logits: torch.Tensor, k: int, scale: torch.Tensor, out: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Route contiguous ``logits [T, E]`` without NaN by a full sort.

    :param out: float32 weights and int32 ids, which are written.
    """
    tokens, experts = logits.shape
    size = triton.next_power_of_2(experts)
    full_sort_kernel[(tokens,)](logits, scale, *out, E=experts, K=k, SIZE=size, num_warps=1)
