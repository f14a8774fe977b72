"""A process group of one process that says that it is two, for DTensors."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def fake_group() -> Iterator[None]:
    """Have such a group inside the block; its collectives move nothing."""
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        yield
    finally:
        distributed.destroy_process_group()
