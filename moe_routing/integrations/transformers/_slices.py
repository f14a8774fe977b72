"""Slices of a batch that every rank of a group holds, with gradients.

Rank r has the rows from r * n on, n of them or what is left, which may be none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import distributed

from moe_routing.distributed.collectives import alive, as_bytes

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup


def sliced(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """Return this rank's rows; the gradient of all rows is gathered from the ranks."""
    result: Tensor = _Sliced.apply(tensor, group)  # type: ignore[no-untyped-call]
    return result


def gathered(part: Tensor, rows: int, group: ProcessGroup) -> Tensor:
    """Return the rows of all ranks, of which this rank has ``part``.

    Every rank goes on with the same rows, so this rank's gradient is its part of theirs.
    """
    result: Tensor = _Gathered.apply(part, rows, group)  # type: ignore[no-untyped-call]
    return result


def _of_each(rows: int, group: ProcessGroup) -> int:
    return -(-rows // distributed.get_world_size(group))


class _Sliced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup) -> Tensor:  # noqa: ANN401 -- a bag by design
        ctx.rows, ctx.group = len(tensor), ref(group)
        n = _of_each(len(tensor), group)
        first = distributed.get_rank(group) * n
        return tensor[first : first + n]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401 -- likewise
        return gathered(grads[0], ctx.rows, alive(ctx.group)), None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, rows: int, group: ProcessGroup) -> Tensor:  # noqa: ANN401 -- likewise
        ctx.group = ref(group)
        n = _of_each(rows, group)
        # As many rows from each rank: nobody need be told how many, and what is void comes last.
        sent = part.new_empty((n, *part.shape[1:]))
        sent[: len(part)] = part
        out = part.new_empty((n * distributed.get_world_size(group), *part.shape[1:]))
        if n:
            distributed.all_gather_into_tensor(as_bytes(out), as_bytes(sent), group=group)
        return out[:rows]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401 -- likewise
        return sliced(grads[0], alive(ctx.group)), None, None
