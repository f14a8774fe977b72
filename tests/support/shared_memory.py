"""Memory that processes on this machine share, where a GPU's would be symmetric memory."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import distributed

from moe_routing_backends.symmetric.memory import Memory


def of_processes(size, device, group):
    """Map a file of every rank, and return their addresses in this process."""
    assert device.type == "cpu"
    descriptor, name = tempfile.mkstemp()
    os.truncate(descriptor, size)
    os.close(descriptor)
    names = [""] * distributed.get_world_size(group)
    distributed.all_gather_object(names, name, group=group)
    mapped = [torch.from_file(file, shared=True, size=size, dtype=torch.uint8) for file in names]
    distributed.barrier(group)
    Path(name).unlink()
    addresses = torch.tensor([tensor.data_ptr() for tensor in mapped])
    return Memory(mapped[distributed.get_rank(group)], addresses, mapped)
