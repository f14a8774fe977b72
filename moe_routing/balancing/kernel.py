"""What the kernels of ``balance`` take and write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor


class BalanceKernel(Protocol):
    """A kernel for one ``BalanceProblem`` on one device, for any B >= 1 and S >= 1.

    The arguments have been checked, but for the values of ``ids``. Memory that a call needs beyond
    its outputs belongs to the call; one kernel serves any number of threads and streams at once.
    """

    def __call__(
        self,
        logits: Tensor,
        ids: Tensor | None,
        weights: Tensor | None,
        sums: Tensor,
        counts: Tensor,
    ) -> None:
        """Sum over the S tokens of each of B batches.

        A token's scores are divided by their sum, in float32, or in float64 for logits in float64;
        scores may be as small as they are, since only their ratios matter. The softmax is one of
        the logits, the other scores are those of ``RoutingSpec``. NaN among the logits of a token
        that counts makes every sum of its batch NaN. A token that does not count adds nothing,
        whatever its logits and ids hold.

        :param logits: ``[B, S, E]``, of unit stride along E, batches and tokens at any stride.
        :param ids: contiguous int32 or int64 ``[B, S, K]`` for problems that count ids: an id
            outside ``[0, E)`` counts for nobody. Otherwise ``None``.
        :param weights: contiguous ``[B, S]``: bool, which tokens count. For problems that count the
            best it is float32, how much each token counts: its scores and its counts are multiplied
            by it, NaN by 0 gives NaN. ``None``: each token counts once.
        :param sums: contiguous ``[B, E]`` to fill: sums of scores, in float32, or in float64 for
            logits in float64 whose ids are counted. ``[B, 1]`` for ``LOGSUMEXP``: sums of
            ``log(sum(e**logits))**2``.
        :param counts: contiguous ``[B, E]`` to fill: how often each expert was selected. int64, or
            float32 for problems that count the best: of equal scores those of any experts are the
            best. ``[B, 0]`` for ``LOGSUMEXP``.
        """
        ...


@runtime_checkable
class BalancesBackward(Protocol):
    """A ``BalanceKernel`` that also computes gradients, which PyTorch operations do otherwise."""

    def backward(
        self, grad: Tensor, logits: Tensor, weights: Tensor | None, grad_logits: Tensor
    ) -> None:
        """Write the gradient of the logits, given that of the sums.

        It is 0 for tokens that do not count, whatever their logits hold. Where the best are
        counted, the gradient of a token's scores is rounded to the dtype of the logits, and the
        scores are the rounded ones.

        :param grad: contiguous, of the shape and dtype of the sums.
        :param logits: as for the call, and ``weights`` likewise.
        :param grad_logits: contiguous ``[B, S, E]`` to fill, of the logits' dtype.
        """
        ...
