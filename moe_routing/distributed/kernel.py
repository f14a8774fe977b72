"""What a transport takes and returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

    from moe_routing.planning.kernel import DispatchPlan


class CapacityError(RuntimeError):
    """A rank had no place for all rows that another sent: ``capacity`` was too small.

    What was computed since then is wrong: the tokens of those rows are NaN.
    """


class Tokens(NamedTuple):
    """What a rank dispatches.

    :ivar hidden: ``[T, H]``, of any dtype and strides. T may be 0, and differ between ranks.
    :ivar ids: int32 or int64 ``[T, K]``: expert e is on rank ``e // experts_per_rank``, and there
        the expert ``e % experts_per_rank``. An id outside the experts of the group has no expert.
    :ivar weights: bfloat16, float16 or float32 ``[T, K]``.
    :ivar scales: ``[T, S]`` of any dtype, moved with the rows; or ``None``.
    """

    hidden: Tensor
    ids: Tensor
    weights: Tensor
    scales: Tensor | None = None


class Received(NamedTuple):
    """What a rank's experts get: rows as they arrived, by source rank.

    :ivar rows: ``[R, H]``, of the dtype of ``hidden``. Rows without an expert may hold anything.
    :ivar ids: int32 ``[R, J]``: the experts of this rank, counted from 0, that compute the row; -1
        in a slot without one. J is 1 with ``reduce="none"``, else K.
    :ivar weights: ``[R, J]``, for sums made here; ``None`` where rows go back unweighted. Those of
        slots without an expert may be anything.
    :ivar scales: ``[R, S]``, or ``None``.
    :ivar state: what the transport's own ``combine`` needs.
    :ivar lent: whether ``rows``, ``ids`` and ``scales`` lie in memory that the transport's next
        call writes. ``ExpertParallel`` copies what it does not use before.
    """

    rows: Tensor
    ids: Tensor
    weights: Tensor | None
    scales: Tensor | None
    state: object
    lent: bool = False


class Exchange(Protocol):
    """A transport between the ranks of a group; every rank makes the same calls in the same order.

    Gradients flow through both calls to ``hidden``, ``weights`` and ``rows``. The arguments have
    been checked on this rank.
    """

    def dispatch(self, tokens: Tokens) -> Received:
        """Send each token to the ranks of its experts, once an expert or once a rank."""
        ...

    def combine(self, rows: Tensor, received: Received) -> Tensor:
        """Return the results to the tokens' ranks, and sum them there: ``[T, H']``.

        :param rows: ``[R, H']``, a result for each row of ``received``: of the expert, or, where
            ``received`` has weights, the weighted sum over the row's slots. Those of rows without
            an expert are not read.
        """
        ...


@runtime_checkable
class CombinesPlanned(Protocol):
    """An ``Exchange`` that takes results in the order of a plan: nobody need reorder them first."""

    def combine_planned(self, rows: Tensor, plan: DispatchPlan, received: Received) -> Tensor:
        """Do as ``combine`` does, with a result for each slot that has an expert.

        :param rows: ``[P, H']``, in the order of a plan of ``received.ids``; not yet weighed.
        """
        ...


@runtime_checkable
class Checks(Protocol):
    """An ``Exchange`` in which something can go wrong on the device, unseen by the host."""

    def check(self) -> None:
        """Wait for the device, and raise what went wrong, on every rank.

        :raises CapacityError: some rank had no place for all rows of another.
        :raises TimeoutError: a rank waited too long for another.
        """
        ...


class ExchangeKernel(Protocol):
    """What a factory returns for an ``ExchangeProblem``."""

    def __call__(self, group: ProcessGroup) -> Exchange:
        """Return the transport between the ranks of this group.

        Called once for an ``ExpertParallel``, on every rank: it may communicate. Keep the group by
        a weak reference, as ``collectives.alive`` says.
        """
        ...
