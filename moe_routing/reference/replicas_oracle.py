"""Which replica a slot gets: the definition of ``logical_to_physical=``, from the ids alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def physical(ids: Tensor, logical_to_physical: Tensor, replica_count: Tensor) -> Tensor:
    """Return the physical ids of logical ``ids [T, C]``, as int64.

    >>> table = torch.tensor([[7, 5], [4, -1]])
    >>> physical(torch.tensor([[0], [0], [0], [1], [-1]]), table, torch.tensor([2, 1])).tolist()
    [[7], [5], [7], [4], [-1]]
    """
    table, counts = logical_to_physical.tolist(), replica_count.tolist()

    def replica(row: int, expert: int) -> int:
        if expert < 0:
            return expert
        used = table[expert][: max(counts[expert], 1)]
        return int(used[row % len(used)])

    rows = [[replica(t, expert) for expert in row] for t, row in enumerate(ids.tolist())]
    return torch.tensor(rows, dtype=torch.int64, device=ids.device).view(ids.shape)
