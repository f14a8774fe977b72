"""SGLang 0.5.23: ``moe_align_block_size`` over moe_routing's plan, argument for argument.

SGLang counts a bucket more than there are experts: pairs without an expert stand first, in blocks
of the expert -1, unless they are to be ignored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

import moe_routing

if TYPE_CHECKING:
    from torch import Tensor

VECTOR = 4
"""SGLang writes the pairs four at a time, so their number is a multiple of it."""
MAX_EXPERTS = 4095
"""With SGLang's own bucket, as many as a plan may have."""


def moe_align_block_size(  # noqa: PLR0913 -- SGLang's signature
    topk_ids: Tensor,
    block_size: int,
    num_experts: int,
    ignore_invalid_expert: bool = False,  # noqa: FBT001, FBT002 -- likewise
    *,
    return_inactive_prefix_count: bool = False,
    pad_expert_ids: bool = False,  # noqa: ARG001 -- the expert of a block past the last is -1 anyway
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sorted pairs, the expert of each block, and the number of places in use.

    With ``return_inactive_prefix_count`` the number of blocks of the expert -1 follows that of the
    places.

    :raises ValueError: there are more experts than a plan may have with SGLang's bucket.
    """
    if num_experts > MAX_EXPERTS:
        msg = f"num_experts: expected an int up to {MAX_EXPERTS}, got {num_experts}"
        raise ValueError(msg)
    known = (topk_ids >= 0) & (topk_ids < num_experts)
    buckets = torch.where(known, topk_ids + 1, -1 if ignore_invalid_expert else 0)
    plan = moe_routing.plan(buckets, num_experts + 1, block=block_size)
    assert plan.block_experts is not None  # noqa: S101 -- for mypy: there are blocks
    pairs = torch.nn.functional.pad(
        plan.order, (0, -len(plan.order) % VECTOR), value=topk_ids.numel()
    )
    # From buckets back to experts; neither bucket 0 nor a block past the last has one.
    experts = (plan.block_experts - 1).clamp_min_(-1)
    blocks = -(-len(pairs) // block_size)
    experts = torch.nn.functional.pad(experts, (0, blocks - len(experts)), value=-1)
    used = plan.offsets[-1:]
    if return_inactive_prefix_count:
        used = torch.cat([used, plan.offsets[1:2] // block_size])
    return pairs, experts, used
