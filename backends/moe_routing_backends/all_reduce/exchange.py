"""Every rank computes the experts that it has for all tokens; an all-reduce adds the results."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast
from weakref import ref

import torch
from torch import distributed

from moe_routing.distributed.collectives import alive, copied, summed
from moe_routing.distributed.kernel import Received

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

    from moe_routing.distributed import ExchangeProblem
    from moe_routing.distributed.kernel import Exchange, ExchangeKernel, Tokens
    from moe_routing_registry import DeviceInfo


class AllReduce:
    """The transport of one group."""

    def __init__(self, experts_per_rank: int, group: ProcessGroup) -> None:
        """Keep what the calls need."""
        self._experts = experts_per_rank
        self._group = ref(group)
        self._rank = distributed.get_rank(group)

    def dispatch(self, tokens: Tokens) -> Received:
        """Move nothing: leave out the slots whose experts are on other ranks."""
        ids = tokens.ids - self._rank * self._experts
        here = (ids >= 0) & (ids < self._experts)
        group = alive(self._group)
        return Received(
            rows=copied(tokens.hidden, group),
            ids=torch.where(here, ids, -1).int(),
            weights=copied(tokens.weights, group),
            scales=tokens.scales,
            state=here.any(dim=1, keepdim=True),
        )

    def combine(self, rows: Tensor, received: Received) -> Tensor:
        """Add the sums of all ranks; rows without an expert here may hold anything."""
        computed = torch.where(cast("Tensor", received.state), rows, 0)
        return summed(computed, alive(self._group))


def build(problem: ExchangeProblem, _device: DeviceInfo) -> ExchangeKernel:
    """Build what makes the transport of a group."""

    def kernel(group: ProcessGroup) -> Exchange:
        return AllReduce(problem.experts_per_rank, group)

    return kernel
