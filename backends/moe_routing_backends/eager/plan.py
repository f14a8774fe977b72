"""``plan`` in plain PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_routing.formula.plan import plan

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.planning import DispatchPlan, PlanKernel, PlanProblem
    from moe_routing_registry import DeviceInfo


def build(problem: PlanProblem, _device: DeviceInfo) -> PlanKernel:
    """Make the kernel; there is nothing to compile."""

    def fill(
        ids: Tensor,
        out: DispatchPlan,
        *,
        capacity: int | None = None,
        weights: Tensor | None = None,
    ) -> None:
        for part, given in zip(plan(problem, ids, capacity, weights), out, strict=True):
            if part is not None and given is not None:
                given.copy_(part)

    return fill
