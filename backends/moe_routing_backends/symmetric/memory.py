"""Memory of a rank that the other ranks of its host write into."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
import torch.distributed._symmetric_memory as symmetric
from torch import distributed

from moe_routing_registry.text import line

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup


LONGEST = 300
"""Characters of an error of PyTorch that ours repeats."""


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


NATIVE_ATOMICS = 3
"""``CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED`` of CUDA's driver: signals are atomic."""


def why_unreached(index: int) -> str:
    """Say which GPU that this process sees cannot be reached from one; ``""`` if all can.

    Other ranks may have GPUs that it does not see: those show when memory is made.
    """
    for other in range(torch.cuda.device_count()):
        if other != index and not (
            torch.cuda.can_device_access_peer(index, other) and _has_atomics(index, other)
        ):
            return (
                f"signals to the memory of the host's other GPUs, GPU {index} cannot to GPU {other}"
            )
    return ""


def _has_atomics(index: int, other: int) -> bool:
    """Tell whether a GPU's atomic operations on another's memory are atomic; yes if unknown."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return True
    found = ctypes.c_int(1)
    error = driver.cuDeviceGetP2PAttribute(ctypes.byref(found), NATIVE_ATOMICS, index, other)
    return bool(error or found.value)


def of_gpus(size: int, device: torch.device, group: ProcessGroup) -> Memory:
    """Make symmetric memory of PyTorch.

    :raises RuntimeError: a GPU cannot reach another's memory.
    """
    own = symmetric.empty(size, dtype=torch.uint8, device=device)
    try:
        handle = symmetric.rendezvous(own, group)
    except RuntimeError as error:
        said = line(str(error), LONGEST)
        msg = (
            f"group: expected GPUs that reach each other's memory, got {said}; "
            "pass transport='all-to-all', or set MOE_ROUTING_BLOCK=symmetric on every rank"
        )
        raise RuntimeError(msg) from error
    addresses = torch.tensor(list(handle.buffer_ptrs), dtype=torch.int64, device=device)
    own.zero_()
    told = torch.zeros(1, device=device)
    distributed.all_reduce(told, group=group)
    told.item()  # the other ranks' memory is zero too, and the host has seen it
    return Memory(own, addresses, handle)
