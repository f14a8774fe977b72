"""What the kernels of ``permute`` and ``combine`` take and write."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.planning.kernel import DispatchPlan


class PermutedRows(NamedTuple):
    """Rows in the order of a plan, and what scales them.

    :ivar rows: ``[P, H]``, or ``[E, capacity, H]`` of a masked plan.
    :ivar scales: ``[P, S]``, or ``[E, capacity, S]``: of quantized rows float32 with S = ceil(H /
        128), one for each 128 neighbouring values of a row.
    """

    rows: Tensor
    scales: Tensor


class PermuteKernel(Protocol):
    """A kernel for one ``PermuteProblem`` on one device, for any T >= 1, H >= 1 and P >= 1.

    The arguments have been checked, but for what the tensors of the plan hold: whatever that is,
    nothing outside the tensors is read or written. Memory that a call needs beyond its outputs
    belongs to the call; one kernel serves any number of threads and streams at once.
    """

    def __call__(
        self, hidden: Tensor, plan: DispatchPlan, out: Tensor, *, scales: Tensor | None = None
    ) -> None:
        """Write the row of its token to each place of ``out``, and zeros to empty places.

        A place p holds a pair if ``p < offsets[E]`` and ``order[p] < T * K``; its token is
        ``order[p] // K``. In a masked plan empty places may be left as they are.

        :param hidden: ``[T, H]``, of unit stride along a row, rows at any stride.
        :param plan: contiguous parts on the device of ``hidden``; ``order`` may be ``[E,
            capacity]``.
        :param out: contiguous ``[P, H]`` with P = ``plan.order.numel()``, of the rows' dtype, or of
            the dtype that the problem quantizes to.
        :param scales: for problems that quantize: contiguous float32 ``[P, ceil(H / 128)]`` to
            fill. With the largest magnitude m of up to 128 neighbouring values of a row, their
            scale is ``max(m, 1e-10) / 448``, and they become ``value / scale``, rounded to the
            nearest, all in float32. NaN gives NaN. Empty places get 0.
        """
        ...


class CombineKernel(Protocol):
    """A kernel for one ``CombineProblem`` on one device, for any T >= 1, H >= 1 and P >= 1.

    Otherwise like ``PermuteKernel``.
    """

    def __call__(
        self, rows: Tensor, plan: DispatchPlan, weights: Tensor | None, out: Tensor
    ) -> None:
        """Write to each row t of ``out`` the sum over k of ``weights[t, k] * rows[inverse[t, k]]``.

        The sum is in float32, from slot 0 to slot K - 1, and rounded once to the dtype of ``out``.
        A pair whose place is not in ``[0, offsets[E])`` adds nothing, whatever its weight is, and
        rows at other places are not read: they may hold anything.

        :param rows: ``[P, H]``, of unit stride along a row, rows at any stride.
        :param plan: as for ``PermuteKernel``.
        :param weights: contiguous ``[T, K]``, or ``None`` for problems without weights: 1 each.
        :param out: contiguous ``[T, H]``, of the rows' dtype.
        """
        ...


@runtime_checkable
class CombinesBackward(Protocol):
    """A ``CombineKernel`` that also computes gradients, which PyTorch operations do otherwise."""

    def backward(  # noqa: PLR0913, PLR0917 -- what a gradient depends on
        self,
        grad: Tensor,
        rows: Tensor,
        plan: DispatchPlan,
        weights: Tensor | None,
        grad_rows: Tensor,
        grad_weights: Tensor | None,
    ) -> None:
        """Write the gradients of the rows and the weights, given that of the result.

        ``grad_rows[p]`` is ``weights[t, k] * grad[t]`` for the pair at place p, and 0 at places
        without a pair. ``grad_weights[t, k]`` is the sum over the columns of ``grad[t] *
        rows[inverse[t, k]]``, in float32, and 0 for a pair without a place.

        :param grad: ``[T, H]``, of the rows' dtype, of unit stride along a row.
        :param grad_rows: contiguous ``[P, H]``, of the rows' dtype.
        :param grad_weights: contiguous float32 ``[T, K]``; ``None`` for problems without weights.
        """
        ...
