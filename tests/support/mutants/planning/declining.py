"""Clause 0: what the spec accepts and declines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_routing_registry import RejectCode, Verdict
from mutants.planning._mutant import Reference, caught_by

if TYPE_CHECKING:
    from moe_routing.planning import PlanProblem
    from moe_routing_registry import DeviceInfo


def _decline_int64(problem: PlanProblem, device: DeviceInfo) -> Verdict:
    del device
    wide = problem.ids_dtype == "int64"
    return Verdict.no(RejectCode.DTYPE, "reads int32 only") if wide else Verdict.yes()


@caught_by(
    "what_it_declines_cannot_be_planned",
    supports=_decline_int64,
    saying=r"declines plan E=64 K=8 int64 \(reads int32 only\), but gets it right",
)
class DeclinesWhatItCan(Reference):
    """Declines int64 ids, which it plans as well as any."""


@caught_by(
    "what_it_declines_cannot_be_planned",
    supports=_decline_int64,
    saying="takes no keyword `unsupported`",
)
class AsksItsOwnSupportsAgain(Reference):
    """Declines int64 ids, and its factory refuses them too."""

    def __init__(self, problem: PlanProblem, device: DeviceInfo) -> None:
        super().__init__(problem, device)
        verdict = _decline_int64(problem, device)
        if not verdict:
            raise NotImplementedError(verdict.reason)


@caught_by(
    "what_it_declines_cannot_be_planned", supports=_decline_int64, saying="but gets it right"
)
class DeclinesUntilItIsTold(AsksItsOwnSupportsAgain):
    """Asks its support rule again, and plans right when it is told to build all the same."""

    def __init__(
        self, problem: PlanProblem, device: DeviceInfo, *, unsupported: bool = False
    ) -> None:
        if unsupported:
            Reference.__init__(self, problem, device)
        else:
            super().__init__(problem, device)


@caught_by(
    "a_declared_gap_is_real",
    gaps={"dtype": "int64 is for others"},
    saying="^declares a gap in dtype, but declines nothing for it$",
)
class DeclaresAGapThatIsNone(Reference):
    """Plans int64 ids, and says that it does not."""


@caught_by(
    "what_it_accepts_it_plans",
    saying="accepts plan E=1024 K=22 .*, but its kernel raised BackendUnavailableError",
)
class AcceptsMoreThanItHas(Reference):
    """Says yes to every problem, and has no kernel for 22 columns."""

    def __init__(self, problem: PlanProblem, device: DeviceInfo) -> None:
        super().__init__(problem, device)
        if problem.topk == 22:
            msg = f"no kernel for {problem}"
            raise RuntimeError(msg)
