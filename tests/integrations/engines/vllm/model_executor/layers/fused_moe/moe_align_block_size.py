"""The signature of vLLM 0.33.0, vllm/model_executor/layers/fused_moe/moe_align_block_size.py.

It has three overloads by ``return_scatter_idx``; this is the one without that result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor


def moe_align_block_size(
    topk_ids: Tensor,
    block_size: int,
    num_experts: int,
    expert_map: Tensor | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
    *,
    return_scatter_idx: Literal[False] = False,
) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError  # its kernel is CUDA's
