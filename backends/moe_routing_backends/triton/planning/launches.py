"""How a plan is launched, and which launch serves how many pairs.

Free of triton.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from moe_routing.planning import PlanProblem

TABLE = Path(__file__).parents[1] / "tables" / "plan" / "sm_90.json"
WARP = 32
COUNTS = 16
"""Counts that a thread holds of a vector over experts."""


class PlanLaunch(NamedTuple):
    """How a plan is launched.

    :ivar launches: 1; 2: counts, then places; or 3: with a scan between them.
    :ivar size: pairs a program places.
    :ivar num_warps: warps a program.
    :ivar tile: pairs that are counted at a time if there is one launch.
    :ivar step: pairs that are placed at a time, of the ``size``, if there are more.
    :ivar group: how many times ``size`` pairs a program of the first launch counts.
    """

    launches: int
    size: int
    num_warps: int
    tile: int = 256
    step: int = 64
    group: int = 1


class PlanStep(NamedTuple):
    """Up to so many pairs, this launch; ``None`` for any number."""

    pairs: int | None
    launch: PlanLaunch


@cache
def _table() -> Any:  # noqa: ANN401 -- JSON that comes with this package
    return json.loads(TABLE.read_text(encoding="utf-8"))


def measured() -> str:
    """Say how the launches came about."""
    return f"launch parameters from tables/plan/{TABLE.name} ({_table()['provenance']})"


def steps_for(problem: PlanProblem) -> tuple[PlanStep, ...]:
    """Return the launches for a problem, by ascending number of pairs.

    They are those of the rule that is nearest by the logarithm of E. With more experts than were
    measured a program has warps enough for vectors over all of them.
    """
    layout = "sorted" if problem.layout == "sorted" else "blocks"
    rules = [rule for rule in _table()["rules"] if rule["layout"] == layout]
    nearest = min(rules, key=lambda rule: abs(math.log(problem.num_experts / rule["experts"])))
    fewest = -(-problem.num_experts // (WARP * COUNTS))
    warps = 1 << (fewest - 1).bit_length()
    return tuple(
        PlanStep(pairs, launch._replace(num_warps=max(launch.num_warps, warps)))
        for pairs, launch in ((step[0], PlanLaunch(*step[1:])) for step in nearest["steps"])
    )
