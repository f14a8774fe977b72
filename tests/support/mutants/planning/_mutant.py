"""A correct backend that plans, and the table of its mutants: what ``mutants._mutant`` is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_routing.formula.plan import plan
from mutants._mutant import Mutant

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from moe_routing.planning import DispatchPlan, PlanProblem
    from moe_routing_registry import DeviceInfo

MUTANTS: list[Mutant] = []


class Reference:
    """A correct backend. Mutants change what it reads, what it plans or what it writes."""

    def __init__(self, problem: PlanProblem, device: DeviceInfo) -> None:
        self.problem = problem
        del device

    def __call__(
        self,
        ids: Tensor,
        out: DispatchPlan,
        *,
        capacity: int | None = None,
        weights: Tensor | None = None,
    ) -> None:
        """Fill the plan."""
        self.write(self.plan(self.read(ids), capacity, weights), out)

    def read(self, ids: Tensor) -> Tensor:
        """Return the ids where they lie."""
        return ids

    def plan(self, ids: Tensor, capacity: int | None, weights: Tensor | None) -> DispatchPlan:
        """Return the plan."""
        return plan(self.problem, ids, capacity, weights)

    def write(self, made: DispatchPlan, out: DispatchPlan) -> None:
        """Write the plan."""
        for part, given in zip(made, out, strict=True):
            if given is not None:
                given.copy_(part)


def caught_by(check: str, *, saying: str, supports: Any = None, only_on: str = "") -> Any:
    """Enter a mutant into the table.

    :param check: the check that must catch it.
    :param saying: what the check must say, a regular expression.
    """

    def enter(factory: Callable[..., Any]) -> Callable[..., Any]:
        MUTANTS.append(
            Mutant(factory, check, saying, supports=supports, only_on=only_on, operation="plan")
        )
        return factory

    return enter
