"""Collectives of torch.distributed with gradients, for transports.

Rows travel as bytes: so they keep their bits in every dtype, also in those that a backend of
torch.distributed does not know.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import ref

import torch
from torch import distributed

if distributed.is_available() and not distributed.is_initialized():
    # This module of torch keeps the group of all ranks that exists when it is imported, which an
    # optimizer does at its first step: see `alive`. Now there is none to keep.
    import torch.distributed.nn.functional

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup


def alive(group: ref[ProcessGroup]) -> ProcessGroup:
    """Return a group that is kept by a weak reference.

    A process that keeps a group past ``destroy_process_group`` may abort at its exit: whoever
    outlives a call keeps no more than a weak reference.

    :raises RuntimeError: the group was destroyed.
    """
    found = group()
    if found is None:
        msg = "the process group was destroyed: make an ExpertParallel of a new one"
        raise RuntimeError(msg)
    return found


class Splits(NamedTuple):
    """How many rows go to each rank, and come from each; ``None`` is the same number everywhere.

    :ivar send: rows for each rank, which lie one after the other.
    :ivar receive: rows from each rank.
    """

    send: tuple[int, ...] | None
    receive: tuple[int, ...] | None

    @property
    def reversed(self) -> Splits:
        """The splits of the way back."""
        return Splits(self.receive, self.send)


EVEN = Splits(None, None)


def all_to_all(rows: Tensor, splits: Splits, places: int, group: ProcessGroup) -> Tensor:
    """Exchange rows with every rank of the group.

    :param rows: ``[P, ...]``; those behind the last one to send are not sent.
    :param places: the rows of the result, at least as many as are received.
    :returns: ``[places, ...]``: the rows of each rank, by rank. Rows behind them hold anything.
        Gradients take the way back, bit for bit; rows that were not sent get 0.
    """
    result: Tensor = _AllToAll.apply(rows, splits, places, group)  # type: ignore[no-untyped-call]
    return result


def copied(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """Return the tensor, which every rank holds; its gradient is summed over the ranks."""
    result: Tensor = _Copied.apply(tensor, group)  # type: ignore[no-untyped-call]
    return result


def summed(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """Return the sum over the ranks, in the tensor's dtype.

    Every rank goes on with the same sum, so the gradient of each is the gradient of the sum.
    """
    result: Tensor = _Summed.apply(tensor, group)  # type: ignore[no-untyped-call]
    return result


def joined(rows: Tensor, *others: Tensor | None) -> Tensor:
    """Return the rows; the way back from them leads to the others too, without a gradient.

    So every rank goes back through what it received, and its collectives match those of the other
    ranks, whether or not the rows were computed from it: a rank may have had no row to compute.
    """
    reached = [other for other in others if other is not None and other.requires_grad]
    if not reached or not torch.is_grad_enabled():
        return rows
    result: Tensor = _Joined.apply(rows, *reached)  # type: ignore[no-untyped-call]
    return result


def _exchanged(rows: Tensor, splits: Splits, places: int, group: ProcessGroup) -> Tensor:
    rows = rows.resolve_conj().resolve_neg().contiguous()
    out = rows.new_empty((places, *rows.shape[1:]))
    send, receive = (None if part is None else list(part) for part in splits)
    sent = rows if send is None else rows[: sum(send)]
    received = out if receive is None else out[: sum(receive)]
    distributed.all_to_all_single(as_bytes(received), as_bytes(sent), receive, send, group=group)
    return out


def as_bytes(rows: Tensor) -> Tensor:
    """View contiguous rows as bytes: ``[N, bytes of a row]``."""
    return rows.flatten(1).view(torch.uint8)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, splits: Splits, places: int, group: ProcessGroup) -> Tensor:  # noqa: ANN401 -- a bag by design
        ctx.splits, ctx.places, ctx.group = splits, len(rows), ref(group)
        return _exchanged(rows, splits, places, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401 -- a bag by design
        grad = all_to_all(grads[0], ctx.splits.reversed, ctx.places, alive(ctx.group))
        if ctx.splits.send is not None:
            grad[sum(ctx.splits.send) :].zero_()
        return grad, None, None, None


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup) -> Tensor:  # noqa: ANN401 -- likewise
        ctx.group = ref(group)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401 -- likewise
        return summed(grads[0], alive(ctx.group)), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup) -> Tensor:  # noqa: ANN401 -- likewise
        ctx.group = ref(group)
        total = tensor.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401 -- likewise
        return copied(grads[0], alive(ctx.group)), None


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, *others: Tensor) -> Tensor:  # noqa: ANN401 -- likewise
        ctx.others = len(others)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 -- likewise
        return grads[0], *(None,) * ctx.others
