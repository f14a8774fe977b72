"""Memory of a rank that the other ranks of its host write into."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
import torch.distributed._symmetric_memory as symmetric
from torch import distributed

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup


class Memory(NamedTuple):
    """As many bytes on every rank, at addresses that every rank can use.

    :ivar own: uint8, this rank's.
    :ivar addresses: int64, of every rank's bytes, as this rank sees them; a multiple of 16.
    :ivar kept: what must live as long.
    """

    own: Tensor
    addresses: Tensor
    kept: object


class Allocate(Protocol):
    """What makes memory; every rank calls it."""

    def __call__(self, size: int, device: torch.device, group: ProcessGroup) -> Memory:
        """Return zeros on every rank; no rank returns before all have theirs."""
        ...


def of_gpus(size: int, device: torch.device, group: ProcessGroup) -> Memory:
    """Make symmetric memory of PyTorch, over NVLink or PCIe.

    :raises RuntimeError: a GPU cannot reach another's memory.
    """
    own = symmetric.empty(size, dtype=torch.uint8, device=device)
    handle = symmetric.rendezvous(own, group)
    addresses = torch.tensor(list(handle.buffer_ptrs), dtype=torch.int64, device=device)
    own.zero_()
    told = torch.zeros(1, device=device)
    distributed.all_reduce(told, group=group)
    told.item()  # the other ranks' memory is zero too, and the host has seen it
    return Memory(own, addresses, handle)
