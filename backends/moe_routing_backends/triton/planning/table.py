"""The launch table of ``plan``: which launch serves how many pairs, as data.

It is the section ``plans`` of a table's file (``tuning/table.py``).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_routing.planning.problem import MAX_EXPERTS
from moe_routing_backends.triton.planning.launches import (
    FALLBACK,
    MOST_PAIRS,
    MOST_WARPS,
    PlanLaunch,
    PlanStep,
    for_width,
)
from moe_routing_backends.triton.tuning.reading import powers_of_two, text, typed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from moe_routing.planning import PlanProblem

LAYOUTS = ("sorted", "blocks")
FIELDS = ("pairs or null", *PlanLaunch._fields)
MOST_AT_ONCE = 256
"""Pairs placed at a time: each is compared with each other one, in registers."""
MOST_COUNTED = 4096
"""Pairs counted at a time, in registers."""
MOST_GROUP = 1024

PlanKey = tuple[int, str]
"""What a rule is for: E, and the layout. ``"masked"`` has the rules of ``"blocks"``."""


@dataclass(frozen=True, slots=True)
class PlanTable:
    """The rules of one arch, and where they come from.

    :ivar source: path of the file, or the name of the rule.
    :ivar provenance: measured where, or derived from what.
    :ivar rules: the steps of each key, by rising number of pairs.
    """

    source: str
    provenance: str
    rules: Mapping[PlanKey, tuple[PlanStep, ...]]

    def nearest(self, problem: PlanProblem) -> tuple[tuple[bool, float], PlanKey] | None:
        """Return how far off the nearest rule is, and its key.

        Of the problem's layout if there is one, that of the least ratio of E.
        """
        experts, layout = plan_key_of(problem)

        def off(key: PlanKey) -> tuple[bool, float]:
            return key[1] != layout, max(key[0], experts) / min(key[0], experts)

        return min(((off(key), key) for key in self.rules), default=None)

    def steps(self, problem: PlanProblem) -> tuple[PlanStep, ...]:
        """Return the steps of the nearest rule, of which the last has no end.

        With many experts a program has warps enough for vectors over all of them.
        """
        nearest = self.nearest(problem)
        steps = list(self.rules[nearest[1]]) if nearest else []
        if not steps or steps[-1].pairs is not None:
            steps.append(PlanStep(None, FALLBACK))
        return tuple(PlanStep(step.pairs, for_width(step.launch, problem)) for step in steps)


def plan_key_of(problem: PlanProblem) -> PlanKey:
    """Return what a rule for the problem is kept under."""
    return problem.num_experts, "sorted" if problem.layout == "sorted" else "blocks"


def steps_up_to(found: Iterable[tuple[int | None, PlanLaunch]]) -> tuple[PlanStep, ...]:
    """Return the lines of a table in which no launch serves more pairs than it may.

    :param found: launches by rising number of pairs, and the number up to which each serves.

    >>> steps_up_to([(64, PlanLaunch(1, 16, 1)), (None, PlanLaunch(2, 64, 2))])[-1].pairs
    131072
    """
    steps: list[PlanStep] = []
    for pairs, launch in found:
        most = MOST_PAIRS.get(launch.launches)
        limit = pairs if most is None else min(pairs or most, most)
        if not steps or limit is None or limit > (steps[-1].pairs or 0):
            steps.append(PlanStep(limit, launch))
    return tuple(steps)


def parse_plans(data: dict[str, Any], source: str) -> PlanTable:
    """Read the section of a file; ``ValueError`` names what is wrong with it."""
    try:
        rules = {
            _key(rule): tuple(_steps(typed(rule, "steps", list)))
            for rule in typed(data, "rules", list)
        }
        return PlanTable(source, text(data, "provenance"), rules)
    except ValueError as error:
        msg = f"plans: {error}"
        raise ValueError(msg) from error


def _key(rule: Any) -> PlanKey:  # noqa: ANN401 -- JSON
    experts, layout = typed(rule, "experts", int), typed(rule, "layout", str)
    if not 1 <= experts <= MAX_EXPERTS:
        msg = f"experts: expected 1 to {MAX_EXPERTS}, got {experts!r:.100}"
        raise ValueError(msg)
    if layout not in LAYOUTS:
        msg = f"layout: expected {' or '.join(map(repr, LAYOUTS))}, got {layout!r:.100}"
        raise ValueError(msg)
    return experts, layout


def _steps(lines: list[Any]) -> Iterator[PlanStep]:
    before: int | None = 0
    for row in lines:
        expected = _wrong(row, before)
        if expected:
            msg = f"steps: expected {expected}, got {row!r:.100}"
            raise ValueError(msg)
        before, *numbers = row
        yield PlanStep(before, PlanLaunch(*numbers))


def _wrong(row: Any, before: int | None) -> str:  # noqa: ANN401 -- JSON
    """Say what was expected of a line that is none, ``""`` of one that a device can launch."""
    if not isinstance(row, list) or len(row) != len(FIELDS):
        return f"[{', '.join(FIELDS)}]"
    pairs, launches, *numbers = row
    if before is None or not (pairs is None or (type(pairs) is int and pairs > before)):
        return "rising pairs, and null in the last line alone"
    if type(launches) is not int or launches not in {1, 2, 3}:
        return "launches of 1, 2 or 3"
    if not powers_of_two(numbers):
        return "powers of two"
    launch = PlanLaunch(launches, *numbers)
    most = MOST_PAIRS.get(launches)
    if most is not None and (pairs is None or pairs > most):
        return f"at most {most} pairs for launches = {launches}"
    return _beyond(launch)


def _beyond(launch: PlanLaunch) -> str:
    at_once = launch.size if launch.launches == 1 else launch.step
    if at_once > MOST_AT_ONCE:
        return f"at most {MOST_AT_ONCE} pairs placed at a time"
    if launch.launches > 1 and launch.size < launch.step:
        return "a step of at most the size"
    limits = {
        "size": MOST_COUNTED,
        "num_warps": MOST_WARPS,
        "tile": MOST_COUNTED,
        "step": MOST_COUNTED,
        "group": MOST_GROUP,
    }
    return next(
        (
            f"{name} of at most {most}"
            for name, most in limits.items()
            if getattr(launch, name) > most
        ),
        "",
    )


def plans_to_json(table: PlanTable) -> str:
    """Write the section of a file as text that ``parse_plans`` reads."""
    lines = ",\n  ".join(
        json.dumps(
            {
                "experts": experts,
                "layout": layout,
                "steps": [[step.pairs, *step.launch] for step in steps],
            }
        )
        for (experts, layout), steps in sorted(table.rules.items())
    )
    return f'{{"provenance": {json.dumps(table.provenance)}, "rules": [\n  {lines}\n]}}'
