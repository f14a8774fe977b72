"""The signature of SGLang 0.5.23's moe_align_block_size.

It is in sglang/srt/layers/moe/moe_runner/triton_utils/moe_align_block_size.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def moe_align_block_size(
    topk_ids: Tensor,
    block_size: int,
    num_experts: int,
    ignore_invalid_expert: bool = False,
    *,
    return_inactive_prefix_count: bool = False,
    pad_expert_ids: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError  # its kernel is CUDA's
