"""How many slots each expert has: the definition of ``counts=``, from the ids alone."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def counted(ids: Tensor, columns: int) -> Tensor:
    """Return how often each of the first so many experts stands in logical ids, as int64.

    >>> counted(torch.tensor([[2, 0], [2, -1]]), 4).tolist()
    [1, 0, 2, 0]
    """
    times = Counter(ids.flatten().tolist())
    return torch.tensor([times[expert] for expert in range(columns)], device=ids.device)
