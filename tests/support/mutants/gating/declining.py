"""Clause 0: backends that say other things than they do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_routing_registry import RejectCode, Verdict
from mutants.gating._mutant import Projects, caught_by

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.gating import GateProblem, Projection
    from moe_routing_registry import DeviceInfo


@caught_by("what_it_accepts_it_gates", saying=r"accepts gate .*, but its kernel raised ValueError")
class AcceptsAnySize(Projects):
    """Accepts sizes that its kernel cannot take."""

    def add(self, projection: Projection) -> Tensor:
        if projection.hidden.shape[1] % 4:
            msg = "a slice of 4"
            raise ValueError(msg)
        return super().add(projection)


def _no_invariance(problem: Any, _device: DeviceInfo) -> Verdict:
    invariant = problem.operation == "gate" and problem.invariant
    return Verdict.no(RejectCode.INVARIANCE, "has no order") if invariant else Verdict.yes()


@caught_by(
    "what_it_declines_cannot_be_gated",
    saying=r"declines gate .* \(has no order\), but gets it right; accept it, or give a reason",
    supports=_no_invariance,
)
class HasAnOrderAfterAll(Projects):
    """Declines what its kernel can do."""

    def __init__(
        self, problem: GateProblem, device: DeviceInfo, *, unsupported: bool = False
    ) -> None:
        super().__init__(problem, device)
        del unsupported


@caught_by(
    "a_declared_gap_is_real",
    saying="declares a gap in invariance, but declines nothing for it",
    gaps={"invariance": "sums come as they come"},
)
class DeclaresAGap(Projects):
    """Declares a gap that it does not have."""
