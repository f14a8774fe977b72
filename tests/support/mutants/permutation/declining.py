"""Clause 0: what the spec accepts and declines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_routing_registry import RejectCode, Verdict
from mutants.permutation._mutant import Combines, Permutes, caught_by

if TYPE_CHECKING:
    from moe_routing_registry import DeviceInfo


def _decline_float16(problem: Any, device: DeviceInfo) -> Verdict:
    del device
    half = problem.dtype == "float16"
    return Verdict.no(RejectCode.DTYPE, "knows no float16") if half else Verdict.yes()


@caught_by(
    "what_it_declines_fails",
    supports=_decline_float16,
    saying=r"declines permute K=8 float16 \(knows no float16\), but gets it right",
)
class PermutesWhatItDeclines(Permutes):
    """Declines float16 rows, which it moves as well as any."""


@caught_by(
    "what_it_declines_fails",
    supports=_decline_float16,
    saying=r"declines combine K=8 float16 weights=float32 \(knows no float16\), but gets it right",
)
class CombinesWhatItDeclines(Combines):
    """Declines float16 rows, which it adds as well as any."""


@caught_by(
    "a_declared_gap_is_real",
    gaps={"dtype": "float16 is for others"},
    saying="^declares a gap in dtype, but declines nothing for it$",
)
class PermutesWithAGapThatIsNone(Permutes):
    """Moves float16 rows, and says that it does not."""


@caught_by(
    "a_declared_gap_is_real",
    gaps={"dtype": "float16 is for others"},
    saying="^declares a gap in dtype, but declines nothing for it$",
)
class CombinesWithAGapThatIsNone(Combines):
    """Adds float16 rows, and says that it does not."""


class _NoneOf22Slots:
    """Has no kernel for 22 slots."""

    def __init__(self, problem: Any, device: DeviceInfo) -> None:
        super().__init__(problem, device)  # type: ignore[call-arg] # of the class that it is mixed into
        if problem.topk == 22:
            msg = f"no kernel for {problem}"
            raise RuntimeError(msg)


@caught_by("what_it_accepts_works", saying="accepts permute K=22 .*, but its kernel raised Backend")
class PermutesLessThanItAccepts(_NoneOf22Slots, Permutes):
    """Says yes to every problem."""


@caught_by("what_it_accepts_works", saying="accepts combine K=22 .*, but its kernel raised Backend")
class CombinesLessThanItAccepts(_NoneOf22Slots, Combines):
    """Says yes to every problem."""
