"""vLLM 0.33: ``moe_align_block_size`` over moe_routing's plan, argument for argument.

It is for vLLM's Triton and Marlin experts. The pairs of an expert stand by token and slot, where
vLLM's kernels leave them as their threads come.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

import moe_routing

if TYPE_CHECKING:
    from torch import Tensor


def moe_align_block_size(  # noqa: PLR0913, PLR0917 -- vLLM's signature
    topk_ids: Tensor,
    block_size: int,
    num_experts: int,
    expert_map: Tensor | None = None,
    pad_sorted_ids: bool = False,  # noqa: FBT001, FBT002 -- likewise
    ignore_invalid_experts: bool = False,  # noqa: FBT001, FBT002 -- likewise
    *,
    return_scatter_idx: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sorted pairs, the expert of each block, and the number of places in use.

    :raises ValueError: ``return_scatter_idx``, which is for another kernel's layout.
    """
    if return_scatter_idx:
        msg = "return_scatter_idx: expected False, got True"
        raise ValueError(msg)
    ids = topk_ids
    if expert_map is not None and ignore_invalid_experts:
        ids = _local(topk_ids, expert_map)
    plan = moe_routing.plan(ids, num_experts, block=block_size)
    assert plan.block_experts is not None  # noqa: S101 -- for mypy: there are blocks
    pairs, experts = plan.order, plan.block_experts
    if pad_sorted_ids:
        missing = -len(pairs) % block_size
        pairs = torch.nn.functional.pad(pairs, (0, missing), value=topk_ids.numel())
    if expert_map is not None and not ignore_invalid_experts:
        # All experts' pairs have places here; the blocks of other ranks' experts are -1.
        experts = _local(experts, expert_map)
    return pairs, experts, plan.offsets[-1:]


def _local(ids: Tensor, expert_map: Tensor) -> Tensor:
    """Rename experts; an id that the map does not have stays outside, as -1."""
    known = (ids >= 0) & (ids < len(expert_map))
    return torch.where(known, expert_map[torch.where(known, ids, 0)], -1).int()
