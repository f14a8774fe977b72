"""How a plan is launched, and which launch serves how many pairs.

Free of triton.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from moe_routing.planning import PlanProblem


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


STEPS = (
    PlanStep(16, PlanLaunch(1, 16, 1)),
    PlanStep(64, PlanLaunch(1, 32, 4)),
    PlanStep(256, PlanLaunch(1, 16, 4, tile=256)),
    PlanStep(512, PlanLaunch(1, 16, 8, tile=512)),
    PlanStep(1024, PlanLaunch(1, 32, 4, tile=1024)),
    PlanStep(4096, PlanLaunch(2, 64, 2, step=64)),
    PlanStep(16384, PlanLaunch(2, 128, 2, step=64)),
    PlanStep(65536, PlanLaunch(3, 128, 2, step=64, group=2)),
    PlanStep(262144, PlanLaunch(3, 128, 2, step=64, group=4)),
    PlanStep(None, PlanLaunch(3, 128, 1, step=64, group=8)),
)
MEASURED = "launch parameters measured on an NVIDIA H100 80GB HBM3 with E = 128, K = 8"


WARP = 32
COUNTS = 16
"""Counts that a thread holds of a vector over experts."""


def steps_for(problem: PlanProblem) -> tuple[PlanStep, ...]:
    """Return the launches for a problem, by ascending number of pairs.

    With many experts a program has warps enough for vectors over all of them.
    """
    fewest = -(-problem.num_experts // (WARP * COUNTS))
    warps = 1 << (fewest - 1).bit_length()
    return tuple(
        step._replace(launch=step.launch._replace(num_warps=max(step.launch.num_warps, warps)))
        for step in STEPS
    )
