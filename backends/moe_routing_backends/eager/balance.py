"""``balance`` in plain PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_routing.formula.balance import summed

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.balancing.kernel import BalanceKernel
    from moe_routing.balancing.problem import BalanceProblem
    from moe_routing_registry import DeviceInfo


def build(problem: BalanceProblem, _device: DeviceInfo) -> BalanceKernel:
    """Make the kernel; there is nothing to compile."""
    best = problem.topk if problem.counts == "best" else 0

    def fill(
        logits: Tensor, ids: Tensor | None, weights: Tensor | None, sums: Tensor, counts: Tensor
    ) -> None:
        made = summed(logits, ids, weights, problem.score, best)
        sums.copy_(made[0])
        counts.copy_(made[1])

    return fill
