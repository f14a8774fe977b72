"""How a plan is launched.

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
    :ivar tile: pairs that are counted at a time if there is one launch; empty places and blocks
        that are filled at a time.
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


class CountedLaunch(NamedTuple):
    """How a plan is launched whose pairs the kernel that makes the ids has counted.

    :ivar pairs: most of them.
    :ivar size: pairs of a block, which a program places.
    :ivar num_warps: warps a program.
    """

    pairs: int
    size: int
    num_warps: int


FEWEST_COUNTED = 513
"""Pairs from which that is faster than a plan of ids that are in memory."""
MOST_COUNTED = 32_768
"""Pairs up to which that was measured."""
COUNTED = (CountedLaunch(6144, 32, 4), CountedLaunch(MOST_COUNTED, 64, 4))
"""By rising number of pairs. Measured on an H200, of 128 and 256 experts."""
FILLED_AT_A_TIME = 256
"""Empty places that are filled at a time, where another kernel than the plan's has counted."""
BLOCKS_OF_GROUP = 16
"""Blocks of a group: a program adds up the counts of all groups, and of the blocks of its own."""
WIDEST_BY_ROUTER = 512
"""Longest vector over experts for which a program has registers.

One that routes has a warp, and one that places counted pairs adds up a group at a time.
"""
MOST_PLACES_OF_ROW = 4096
"""Places of a plan of one row up to which the program that routes fills the empty ones."""


def counted_launch(pairs: int, width: int) -> CountedLaunch | None:
    """Return the launch for pairs that are counted where ids are made; ``None`` if none should be.

    :param width: length of vectors over experts.

    >>> counted_launch(8, 128), counted_launch(1024, 256)
    (None, CountedLaunch(pairs=6144, size=32, num_warps=4))
    """
    if pairs < FEWEST_COUNTED or width > WIDEST_BY_ROUTER:
        return None
    return next((launch for launch in COUNTED if pairs <= launch.pairs), None)


MOST_PAIRS = {1: 1 << 13, 2: 1 << 17}
"""Pairs up to which so many launches serve; three serve any number.

Beyond, their time grows with the square of the pairs: every program of one launch counts all pairs,
and every program of the second of two adds up the counts of all groups.
"""
FALLBACK = PlanLaunch(3, 128, 1, step=64, group=8)
"""The launch that serves any number of pairs: of sm_90, at 128 experts."""
MOST_WARPS = 16
"""Warps a program: 1,024 threads where a warp has 64 lanes."""
WARP = 32
COUNTS = 16
"""Counts that a thread holds of a vector over experts."""


def for_width(launch: PlanLaunch, problem: PlanProblem) -> PlanLaunch:
    """Return the launch with warps enough for vectors over all experts of the problem."""
    fewest = -(-problem.num_experts // (WARP * COUNTS))
    warps = 1 << (fewest - 1).bit_length()
    return launch._replace(num_warps=max(launch.num_warps, warps))
