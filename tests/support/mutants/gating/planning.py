"""Clauses 2 and 11: the plan of what is gated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mutants.gating._mutant import PLANS, Planned, caught_by

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.gating import GateProblem, Projection
    from moe_routing.kernel import RoutingOutput
    from moe_routing.planning import DispatchPlan, PlanKernel
    from moe_routing_registry import DeviceInfo


@caught_by("what_is_gated_is_planned", saying=r"call \d: \w+: \d+ of \d+ are wrong", others=PLANS)
class ForgetsTheLastRow(Planned):
    """Counts the rows of whole blocks of 64 pairs alone."""

    def plan(
        self, planner: PlanKernel, ids: Tensor, out: DispatchPlan, capacity: int | None
    ) -> None:
        rest = ids.numel() % 64
        if ids.numel() > 64 and rest:
            ids = ids.clone()
            ids.view(-1)[-rest:] = -1
        super().plan(planner, ids, out, capacity)


@caught_by("what_is_gated_is_planned", saying=r"call \d: \w+: \d+ of \d+ are wrong", others=PLANS)
class ForgetsSharedExperts(Planned):
    """Plans the selected experts alone."""

    def plan(
        self, planner: PlanKernel, ids: Tensor, out: DispatchPlan, capacity: int | None
    ) -> None:
        shared = self.problem.spec.shared_experts
        if shared:
            ids = ids.clone()
            ids[:, -shared:] = -1
        super().plan(planner, ids, out, capacity)


@caught_by("what_is_gated_is_planned", saying=r"call [23]: \w+: \d+ of \d+ are wrong", others=PLANS)
class PlansTheFirstIds(Planned):
    """Keeps the first ids of each shape, and plans those."""

    def __init__(self, problem: GateProblem, device: DeviceInfo) -> None:
        super().__init__(problem, device)
        self.kept: dict[tuple[int, ...], Tensor] = {}

    def plan(
        self, planner: PlanKernel, ids: Tensor, out: DispatchPlan, capacity: int | None
    ) -> None:
        super().plan(planner, self.kept.setdefault(tuple(ids.shape), ids.clone()), out, capacity)


@caught_by("what_is_gated_is_planned", saying=": other ids", others=PLANS)
class ForgetsTheMap(Planned):
    """Routes to logical experts where it plans."""

    def planned(
        self, projection: Projection, planner: PlanKernel, out: DispatchPlan, **operands: Any
    ) -> RoutingOutput | None:
        operands["expert_map"] = None
        return super().planned(projection, planner, out, **operands)


@caught_by(
    "a_graph_of_a_plan_replays_with_new_inputs", saying=r"replay \d: \w+: ", only_on="cuda",
    others=PLANS,
)  # fmt: skip
class PlansWhatItKept(Planned):
    """Keeps the first ids, and plans those while a graph is captured."""

    def __init__(self, problem: GateProblem, device: DeviceInfo) -> None:
        super().__init__(problem, device)
        self.kept: Tensor | None = None

    def plan(
        self, planner: PlanKernel, ids: Tensor, out: DispatchPlan, capacity: int | None
    ) -> None:
        if self.kept is None or self.kept.shape != ids.shape:
            self.kept = ids.clone()
        capturing = torch.cuda.is_current_stream_capturing()
        super().plan(planner, self.kept if capturing else ids, out, capacity)
