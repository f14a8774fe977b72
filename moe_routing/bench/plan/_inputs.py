"""``Inputs``: the ids that are planned, in as many sets as no cache holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moe_routing import DispatchPlan
from moe_routing.bench._implementation import FEWEST_SETS, refuse_beyond_memory, sets_for
from moe_routing.formula import plan as formula
from moe_routing.planning.problem import MOST
from moe_routing.reference import plan_oracle

if TYPE_CHECKING:
    from moe_routing.bench._plan_settings import PlanCase
    from moe_routing_registry import DeviceInfo

_MOST_WALKED = 1 << 15
"""Pairs up to which the oracle, which walks over them in Python, says what is right."""
_INT32 = 4
_DRAWN = 4
"""Bytes of the random number that an expert gets for each token."""
_PLANNING = 8 * 8
"""Bytes of a place that PyTorch holds at once while it sorts and scatters, in int64."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """Sets of ids, and plans to write to.

    :ivar given: each int32 ``[T, K]``; the ids of a token differ.
    :ivar bytes: that one call must move: the ids once, the plan once.
    :ivar expected: the one right plan of the first set.
    """

    case: PlanCase
    given: list[torch.Tensor]
    outs: list[DispatchPlan]
    bytes: int
    expected: DispatchPlan


def check_memory(case: PlanCase, device: DeviceInfo) -> None:
    """Refuse a case that int32 or the device's memory cannot hold, before anything is allocated.

    :raises ValueError: the plan has more places than int32 counts, or the case needs more memory
        than the device has.
    """
    pairs = case.tokens * case.topk
    places = formula.places(pairs, case.num_experts, case.block or 1)
    if places > MOST:
        msg = f"tokens: expected a plan of at most {MOST} places, got {case}, which needs {places}"
        raise ValueError(msg)
    drawing = case.tokens * case.num_experts * _DRAWN
    sets = FEWEST_SETS * (2 * pairs + places) * _INT32
    refuse_beyond_memory(case, device, drawing + sets + places * _PLANNING)


def make(case: PlanCase, device: torch.device, cache: int) -> Inputs:
    """Make the sets that ``sets_for`` counts."""
    generator = torch.Generator(device).manual_seed(0)

    def drawn() -> torch.Tensor:
        scores = torch.rand(case.tokens, case.num_experts, device=device, generator=generator)
        return scores.topk(case.topk).indices.int()

    first = drawn()
    walked = first.numel() <= _MOST_WALKED
    expected = (plan_oracle if walked else formula).plan(case.problem, first.cpu())
    moved = first.nbytes + sum(part.nbytes for part in expected if part is not None)
    sets = sets_for(cache, moved)
    return Inputs(
        case,
        [first, *(drawn() for _ in range(sets - 1))],
        [_like(expected, device) for _ in range(sets)],
        moved,
        expected,
    )


def _like(made: DispatchPlan, device: torch.device) -> DispatchPlan:
    return DispatchPlan._make(
        None if part is None else torch.empty_like(part, device=device) for part in made
    )
