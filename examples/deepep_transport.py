"""A transport over DeepEP: a sketch that has never been run.

DeepEP needs its own CUDA build, NVLink or RDMA, and is not installed where moe-routing is tested.
mypy checks this file against the protocol `Buffer` below, which states the calls of the class of
that name (version 1 of DeepEP) as its documentation has them. Before use, run the conformance kit
with it: `moe-routing conformance deepep --operation exchange`.

The spec that names `build` stands in a module without torch; docs/expert_parallel.md shows it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from moe_routing.distributed import Received

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from moe_routing.distributed import Exchange, ExchangeKernel, ExchangeProblem, Tokens
    from moe_routing_registry import DeviceInfo

Handle = tuple[Any, ...]
"""How DeepEP remembers which rows went where."""


class Buffer(Protocol):
    """What is called of `deep_ep.Buffer`."""

    def get_dispatch_layout(
        self, topk_idx: Tensor, num_experts: int
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, object]:
        """Return what is sent: tokens for each rank, RDMA rank and expert, and who gets which."""
        ...

    def dispatch(  # noqa: PLR0913 -- DeepEP's own
        self,
        x: Tensor,
        *,
        handle: Handle | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, list[int] | None, Handle | None, object]:
        """Send tokens once to each rank; return rows, local ids, weights, counts and a handle."""
        ...

    def combine(
        self, x: Tensor, handle: Handle, topk_weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, object]:
        """Send a row back for each that came, and add those of a token, without weights."""
        ...


class DeepEP:
    """The transport of one group, for ``reduce="rank"``.

    DeepEP adds in bfloat16 and in an order of its own, as ``reduce="rank"`` allows.
    """

    def __init__(self, buffer: Buffer, num_experts: int) -> None:
        """Keep what the calls need."""
        self._buffer = buffer
        self._num_experts = num_experts

    def dispatch(self, tokens: Tokens) -> Received:
        """Send each token once to each rank that has one of its experts."""
        if tokens.scales is not None:
            msg = "scales: expected None, since this sketch moves bfloat16 rows, got a tensor"
            raise ValueError(msg)
        known = (tokens.ids >= 0) & (tokens.ids < self._num_experts)
        ids = torch.where(known, tokens.ids, -1).long()
        handles: list[Handle] = []
        rows, local, weights = _Dispatch.apply(  # type: ignore[no-untyped-call]
            tokens.hidden.contiguous(),
            tokens.weights.float(),
            ids,
            _Call(self._buffer, self._num_experts, handles),
        )
        return Received(rows, local.int(), weights, None, handles[0])

    def combine(self, rows: Tensor, received: Received) -> Tensor:
        """Send the sums of this rank back, and add those of all ranks for each token."""
        handle = cast("Handle", received.state)
        here = (received.ids >= 0).any(dim=1, keepdim=True)
        rows = torch.where(here, rows, 0)  # a row without an expert may hold anything
        result: Tensor = _Combine.apply(rows, self._buffer, handle)  # type: ignore[no-untyped-call]
        return result


class _Call(NamedTuple):
    """What autograd does not look at.

    :ivar handles: gets the handle of the call.
    """

    buffer: Buffer
    num_experts: int
    handles: list[Handle]


class _Dispatch(torch.autograd.Function):
    """The way back of a dispatch is a combine."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 -- a bag by design
        hidden: Tensor,
        weights: Tensor,
        ids: Tensor,
        call: _Call,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Send, and keep the handle for both ways back."""
        per_rank, per_rdma_rank, per_expert, in_rank, _ = call.buffer.get_dispatch_layout(
            ids, call.num_experts
        )
        rows, local, sent, _, handle, _ = call.buffer.dispatch(
            hidden,
            topk_idx=ids,
            topk_weights=weights,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
        )
        if local is None or sent is None or handle is None:
            msg = "DeepEP returned no ids, weights or handle for a call that brought them"
            raise RuntimeError(msg)
        call.handles.append(handle)
        ctx.buffer, ctx.handle = call.buffer, handle
        ctx.mark_non_differentiable(local)
        return rows, local, sent

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:  # noqa: ANN401 -- likewise
        """Add the gradients of a token's rows and weights over ranks."""
        of_rows, _, of_weights = grads
        hidden, weights, _ = ctx.buffer.combine(
            of_rows.contiguous(), ctx.handle, topk_weights=of_weights.contiguous()
        )
        return hidden, weights, None, None


class _Combine(torch.autograd.Function):
    """The way back of a combine is a dispatch to where the rows came from."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, buffer: Buffer, handle: Handle) -> Tensor:  # noqa: ANN401 -- likewise
        """Send back, and add."""
        ctx.buffer, ctx.handle = buffer, handle
        return buffer.combine(rows.contiguous(), handle)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401 -- likewise
        """Send a token's gradient to each rank that sent a row for it."""
        rows: Tensor = ctx.buffer.dispatch(grads[0].contiguous(), handle=ctx.handle)[0]
        return rows, None, None


NVLINK_BYTES = 1 << 30
RDMA_BYTES = 1 << 30
"""Of each rank's buffer; DeepEP's configurations say how much a hidden size needs."""


def build(problem: ExchangeProblem, _device: DeviceInfo) -> ExchangeKernel:
    """Build what makes the transport of a group; raise where DeepEP is not installed."""
    import deep_ep  # type: ignore[import-not-found]

    def kernel(group: ProcessGroup) -> Exchange:
        rdma = RDMA_BYTES if problem.hosts > 1 else 0
        buffer: Buffer = deep_ep.Buffer(group, NVLINK_BYTES, rdma)
        return DeepEP(buffer, problem.ranks * problem.experts_per_rank)

    return kernel
