"""What a call of ``plan`` hands to a kernel, and what a dispatch plan is."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class DispatchPlan(NamedTuple):
    """Where each pair of a token and a slot lies when pairs are grouped by expert.

    A pair is a number ``t * K + k``: slot k of token t. A *place* is an index into ``order``. The
    pairs of an expert lie at consecutive places, by token and then by slot. Everything is int32,
    contiguous, and on the device of the ids.

    :ivar order: the pair at each place: ``[T * K]``; in blocks ``[T * K + min(T * K, E) * (block -
        1)]``; masked ``[E, capacity]``. ``T * K`` stands at places without a pair.
    :ivar inverse: ``[T, K]``, the place of each pair. A pair has a place among the experts' if it
        is in ``[0, offsets[E])``. A pair without one (its id is outside ``[0, E)``, or it was
        dropped) is -1 in the layouts with empty places. In the sorted layout such pairs stand at
        the end of ``order``, by token and then by slot, so that ``order`` is a permutation.
    :ivar counts: ``[E]``, the pairs of each expert that have a place.
    :ivar offsets: ``[E + 1]``, the first place of each expert, and the end of the last. In blocks
        they are multiples of ``block``.
    :ivar block_experts: in blocks, ``[ceil(len(order) / block)]``: the expert of each block, -1
        from the end of the last expert on; otherwise ``None``.
    :ivar num_dropped: with a capacity, ``[1]``: how many pairs of experts in ``[0, E)`` have no
        place; otherwise ``None``.
    """

    order: Tensor
    inverse: Tensor
    counts: Tensor
    offsets: Tensor
    block_experts: Tensor | None = None
    num_dropped: Tensor | None = None


class RoutedPlan(NamedTuple):
    """What ``Router.with_plan`` returns: weights, ids, and the plan of the ids."""

    weights: Tensor
    ids: Tensor
    plan: DispatchPlan


class PlanKernel(Protocol):
    """A kernel for one ``PlanProblem`` on one device, for any number of tokens T >= 1.

    The arguments have been checked, and T is not 0. ``ids`` may have any strides. One kernel serves
    calls from any number of threads and streams at once: memory that a call needs beyond its
    outputs belongs to the call.
    """

    def __call__(
        self,
        ids: Tensor,
        out: DispatchPlan,
        *,
        capacity: int | None = None,
        weights: Tensor | None = None,
    ) -> None:
        """Fill every element of ``out``, whose tensors are contiguous and hold anything before.

        :param ids: ``[T, K]``, of any values. Nothing is read or written by an id outside ``[0,
            E)``.
        :param capacity: the most places of an expert, 1 or more; for problems that drop.
        :param weights: float32 ``[T, K]``, for problems that drop the least weight.
        """
        ...


@runtime_checkable
class PreparesPlans(Protocol):
    """A kernel that takes less host time for calls that are like one that it has served."""

    def prepared(
        self, ids: Tensor, out: DispatchPlan, capacity: int | None
    ) -> Callable[[Tensor, DispatchPlan], None] | None:
        """Return a function for later calls of the same shapes, strides and capacity, or ``None``.

        :param ids: what was planned, into ``out``. Problems that drop the least weight are not
            asked for.
        """
        ...
