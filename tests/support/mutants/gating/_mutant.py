"""Correct backends that gate, and the table of their mutants."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from moe_routing.formula import by_sort, finish, route, whole
from moe_routing.formula.gate import logits as formula
from moe_routing_backends.eager.gate import in_one_order
from mutants._mutant import Mutant

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from moe_routing.gating import GateProblem, Projection
    from moe_routing.kernel import RoutingOutput
    from moe_routing.planning import DispatchPlan, PlanKernel
    from moe_routing_registry import DeviceInfo

MUTANTS: list[Mutant] = []
ROUTES = {"route": "moe_routing_backends.eager.route:build"}
PLANS = {**ROUTES, "plan": "moe_routing_backends.eager.plan:build"}


class Projects:
    """A correct backend that writes logits. Mutants change what it reads, adds or writes."""

    def __init__(self, problem: GateProblem, device: DeviceInfo) -> None:
        self.problem = problem
        del device

    def __call__(self, projection: Projection, logits: Tensor) -> None:
        """Fill the logits."""
        self.write(self.add(self.read(projection)), logits)

    def read(self, projection: Projection) -> Projection:
        """Return the operands where they lie."""
        return projection

    def add(self, projection: Projection) -> Tensor:
        """Return float32 logits."""
        hidden, weight = projection[:2]
        made = torch.empty(len(hidden), len(weight), device=hidden.device)
        if self.problem.invariant:
            in_one_order(projection, made)
        else:
            made.copy_(formula(projection, torch.float64))
        return made

    def write(self, made: Tensor, logits: Tensor) -> None:
        """Round the logits, and write them."""
        logits.copy_(made)


class Fused(Projects):
    """A correct backend that routes in the same call. Mutants change what it routes.

    :cvar asked: whether logits were asked for, a bool a call.
    """

    asked: ClassVar[list[bool]] = []

    def routed(
        self, projection: Projection, logits: Tensor | None, **operands: Any
    ) -> RoutingOutput:
        """Gate."""
        self.asked.append(logits is not None)
        made = self.add(self.read(projection)).to(getattr(torch, self.problem.logits_dtype))
        if logits is not None:
            self.write(made, logits)
        return self.route(made, **operands)

    def route(
        self,
        logits: Tensor,
        *,
        num_valid_tokens: int | Tensor | None = None,
        expert_map: Tensor | None = None,
        ids: Tensor | None = None,
        **operands: Any,
    ) -> RoutingOutput:
        """Route the logits."""
        problem = self.problem
        weights, made = route(
            problem.spec, problem.topk, logits, select=whole(by_sort), recorded=ids, **operands
        )
        return finish(
            problem.spec, weights, made, num_experts=problem.num_experts,
            ids_dtype=getattr(torch, problem.ids_dtype), num_valid_tokens=num_valid_tokens,
            expert_map=expert_map, replayed=ids is not None,
        )  # fmt: skip


class Planned(Fused):
    """A correct backend that plans in the same call too. Mutants change what it plans."""

    def planned(
        self,
        projection: Projection,
        planner: PlanKernel,
        out: DispatchPlan,
        *,
        capacity: int | None = None,
        **operands: Any,
    ) -> RoutingOutput | None:
        """Gate and plan."""
        made = self.routed(projection, None, **operands)
        self.plan(planner, made.ids, out, capacity)
        return made

    def plan(
        self, planner: PlanKernel, ids: Tensor, out: DispatchPlan, capacity: int | None
    ) -> None:
        """Plan the ids."""
        planner(ids, out, capacity=capacity)


def caught_by(check: str, *, saying: str, **more: Any) -> Any:
    """Enter a mutant into the table.

    :param check: the check that must catch it.
    :param saying: what the check must say, a regular expression.
    :param more: other fields of ``Mutant``.
    """

    def enter(factory: Callable[..., Any]) -> Callable[..., Any]:
        others = {"others": ROUTES, **more}
        MUTANTS.append(Mutant(factory, check, saying, operation="gate", **others))
        return factory

    return enter
