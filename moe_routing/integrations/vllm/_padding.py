"""Rows that only pad a CUDA graph.

VLLM marks them with a mask, and wants ids -1 and weights 0 there.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from moe_routing import Router

_ALIGNED = 128
"""Elements of 4 bytes between two allocations of torch's: kernels of the experts may rely on it."""


def rule() -> Callable[[int], Tensor | None]:
    """Return vLLM's rule, which takes a number of rows and tells which of them are padding.

    The rule returns bools ``[rows]``, or ``None`` if no row is padding.
    """
    from vllm.model_executor.layers.fused_moe.router import fused_topk_router

    of_vllm: Callable[[int], Tensor | None] = fused_topk_router._get_padding_mask  # noqa: SLF001 -- its routers call it too
    return of_vllm


def route_and_blank(  # noqa: PLR0913 -- the operands that vLLM has
    route: Router,
    logits: Tensor,
    topk: int,
    *,
    bias: Tensor | None,
    ids_dtype: torch.dtype,
    mask: Tensor,
) -> tuple[Tensor, Tensor]:
    """Route, then blank the rows of the mask.

    In one launch for int32 ids, which lie in one buffer with the weights.
    """
    rows = mask.unsqueeze(1)
    if ids_dtype is not torch.int32:
        weights, ids = route(logits, topk, bias=bias, ids_dtype=ids_dtype)
        return weights.masked_fill(rows, 0.0).contiguous(), ids.masked_fill(rows, -1).contiguous()
    shape = (logits.shape[0], topk)
    apart = -(-shape[0] * shape[1] // _ALIGNED) * _ALIGNED
    buffer = torch.empty((2, apart), dtype=torch.int32, device=logits.device)
    both = buffer[:, : shape[0] * shape[1]].unflatten(1, shape)
    weights, ids = both[0].view(torch.float32), both[1]
    route(logits, topk, bias=bias, out=(weights, ids))
    torch.where(rows, _blanks(logits.device), both, out=both)
    return weights, ids


@cache
def _blanks(device: torch.device) -> Tensor:
    """Return the bits of 0.0 and -1, ``[2, 1, 1]``.

    Made on the device, in vLLM's first run, which captures nothing.
    """
    return torch.arange(0, -2, -1, dtype=torch.int32, device=device).view(2, 1, 1)
