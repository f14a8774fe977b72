"""``moe-routing tune plan``: what is fastest goes into the user's own table."""

from __future__ import annotations

import itertools
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from moe_routing.formula.plan import plan as formula
from moe_routing.planning import DispatchPlan
from moe_routing.planning.call import shapes
from moe_routing_backends.triton.kernels.spec import next_power_of_two
from moe_routing_backends.triton.planning.launches import (
    MOST_PAIRS,
    PlanLaunch,
    PlanStep,
    for_width,
)
from moe_routing_backends.triton.planning.planner import TritonPlanner
from moe_routing_backends.triton.planning.table import plan_key_of, steps_up_to
from moe_routing_backends.triton.tuning import measure as measuring
from moe_routing_backends.triton.tuning.choose import describe_plan_table, plan_table_for
from moe_routing_backends.triton.tuning.measure import LEAST_SETS, changes, tuned
from moe_routing_backends.triton.tuning.store import check_keeping, keep_plans
from moe_routing_registry.text import refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from moe_routing.planning import PlanProblem
    from moe_routing_backends.triton.tuning.measure import Clock, Measured, OnStep, Tuned
    from moe_routing_registry import DeviceInfo

TILES = (256, 512, 1024, 2048)
ONE = ((16, 1), (32, 1), (16, 4), (32, 4), (16, 8), (32, 8))
"""Size and warps of candidates of one launch."""
TWO = ((64, 2, (1, 4)), (64, 4, (1, 2, 4)), (128, 2, (1, 4)), (128, 4, (2, 4)))
"""Size, warps and groups of candidates of two launches."""
THREE = (
    (64, 1, 32, (4,)),
    (64, 2, 64, (8,)),
    (128, 1, 64, (4, 8)),
    (128, 2, 64, (2, 4, 8)),
    (128, 4, 128, (1, 2, 4)),
    (256, 2, 64, (2, 4, 8, 16)),
)
"""Size, warps, step and groups of candidates of three launches."""
FILLED = 512
"""Empty places and blocks that candidates of several launches fill at a time."""
KERNELS = {1: 2, 2: 6, 3: 3}
"""About how many kernels each number of launches compiles.

One launch: for one program, and for several. Two: the places for each power of two of groups.
"""
UNLIKE_ANY = -7
"""No place, pair, count or expert."""


def tune(
    problem: PlanProblem,
    device: DeviceInfo,
    *,
    tokens: Sequence[int] | None = None,
    on_step: OnStep = lambda _what, _done, _total: None,
    clock: Clock | None = None,
) -> Tuned[PlanLaunch, PlanStep]:
    """Measure as ``measure`` does, and keep the steps in the user's own table.

    :raises ValueError: the problem has a capacity: problems that do have the rules of others.
    :raises OSError: the table could not be written; nothing is measured then.
    """
    check_without_capacity(problem)
    check_keeping(device)
    measured = measure(problem, device, tokens=tokens, on_step=on_step, clock=clock)
    steps = steps_of(measured.times, problem.topk)
    return tuned(
        measured, device, steps, partial(keep_plans, device, {plan_key_of(problem): steps})
    )


def check_without_capacity(problem: PlanProblem) -> None:
    """Refuse a problem with a capacity.

    :raises ValueError: it has one.
    """
    if problem.drop != "nothing" or problem.layout == "masked":
        expected = "one without a capacity (the launches of those with one are the same)"
        raise ValueError(refusal("problem", expected, str(problem)))


def measure(
    problem: PlanProblem,
    device: DeviceInfo,
    *,
    tokens: Sequence[int] | None = None,
    on_step: OnStep = lambda _what, _done, _total: None,
    clock: Clock | None = None,
) -> Measured[PlanLaunch]:
    """Check and time candidates for each number of tokens, as ``tuning/measure.py`` says."""
    said = describe_plan_table(device, problem)
    steps = plan_table_for(device, problem).steps(problem)
    launches = list(dict.fromkeys([*(step.launch for step in steps), *candidates(problem)]))
    return measuring.measure(
        PlanInputs(problem, device, max(tokens or measuring.TOKENS)),
        launches,
        lambda T: launch_at(steps, T * problem.topk),
        said,
        tokens=tokens,
        on_step=on_step,
        clock=clock,
    )


def candidates(problem: PlanProblem) -> list[PlanLaunch]:
    """Return the launches that are worth a try, few, for each must be compiled."""
    offered = [
        *(
            PlanLaunch(1, size, warps, tile=tile)
            for size, warps in ONE
            for tile in (TILES if warps > 1 else TILES[:1])
        ),
        *(
            PlanLaunch(2, size, warps, tile=FILLED, group=g)
            for size, warps, groups in TWO
            for g in groups
        ),
        *(
            PlanLaunch(3, size, warps, tile=FILLED, step=step, group=g)
            for size, warps, step, groups in THREE
            for g in groups
        ),
    ]
    return list(dict.fromkeys(for_width(launch, problem) for launch in offered))


def steps_of(times: Mapping[int, Mapping[PlanLaunch, float]], topk: int) -> tuple[PlanStep, ...]:
    """Return the lines of a table: the launches that are chosen.

    :param times: by number of tokens.
    """
    return steps_up_to(changes({T * topk: of for T, of in times.items()}))


def launch_at(steps: Sequence[PlanStep], pairs: int) -> PlanLaunch:
    """Return the launch that serves so many pairs."""
    return next(step.launch for step in steps if step.pairs is None or step.pairs >= pairs)


def shown(launch: PlanLaunch) -> str:
    """Name a launch in a few words."""
    how = (
        f"counted {launch.tile} at a time"
        if launch.launches == 1
        else f"{launch.step} at a time, groups of {launch.group}"
    )
    number = f"{launch.launches} launch{'es' if launch.launches > 1 else ''}"
    return f"{number}, {launch.size} pairs a program, {how}, {launch.num_warps} warps"


class PlanInputs:
    """Seeded ids of one problem, plans to write into, and what they must hold."""

    def __init__(self, problem: PlanProblem, info: DeviceInfo, most: int) -> None:
        """Draw ids of up to so many tokens."""
        self.device = torch.device(
            "cpu" if info.type == "cpu" else f"{info.type}:{info.index or 0}"
        )
        self.problem, self.info = problem, info
        generator = torch.Generator(device=self.device).manual_seed(0)
        self._ids = torch.randint(
            problem.num_experts,
            (LEAST_SETS, most, problem.topk),
            generator=generator,
            device=self.device,
            dtype=getattr(torch, problem.ids_dtype),
        )
        self._plans: dict[int, list[DispatchPlan]] = {}
        self._expected: DispatchPlan | None = None

    def shown(self, launch: PlanLaunch) -> str:
        """Name a launch in a few words."""
        return shown(launch)

    def kernels(self, launch: PlanLaunch) -> int:
        """Return about how many kernels a launch compiles, over all sizes."""
        return KERNELS[launch.launches]

    def serves(self, launch: PlanLaunch, tokens: int) -> bool:
        """Tell whether a launch may serve so many pairs, and its tile is not empty by half."""
        pairs = tokens * self.problem.topk
        fits = launch.launches > 1 or launch.tile <= max(TILES[0], next_power_of_two(pairs))
        return fits and pairs <= MOST_PAIRS.get(launch.launches, pairs)

    def bound(self, launch: PlanLaunch) -> TritonPlanner:
        """Return a planner that makes only this launch."""
        return TritonPlanner(self.problem, self.info, (PlanStep(None, launch),))

    def compile(self, planner: TritonPlanner) -> None:
        """Plan a token."""
        self.planned(planner, 1)

    def planned(self, planner: TritonPlanner, tokens: int) -> DispatchPlan:
        """Plan the first ids into a plan that holds nothing right."""
        ids, out = self._sets(tokens)[0]
        for part in out:
            if part is not None:
                part.fill_(UNLIKE_ANY)  # what stays so was not written
        planner(ids, out)
        return out

    def expect(self, planner: TritonPlanner, tokens: int) -> None:
        """Keep what the formula says, and hold the planner in use to it."""
        self._expected = formula(self.problem, self._ids[0, :tokens])
        if not self.same(planner, tokens):
            msg = (
                f"the launch in use at T = {tokens} computes another plan than the formula, so "
                "nothing is tuned"
            )
            raise RuntimeError(msg)

    def same(self, planner: TritonPlanner, tokens: int) -> bool:
        """Tell whether a planner gives the same plan."""
        assert self._expected is not None  # noqa: S101 -- for mypy: `expect` came before
        found = self.planned(planner, tokens)
        return all(
            a is b is None or (a is not None and b is not None and torch.equal(a, b))
            for a, b in zip(found, self._expected, strict=True)
        )

    def turns(self, planner: TritonPlanner, tokens: int) -> Callable[[], object]:
        """Return what plans the ids in turns."""
        sets = itertools.cycle(self._sets(tokens))

        def work() -> None:
            ids, out = next(sets)
            planner(ids, out)

        return work

    def _sets(self, tokens: int) -> list[tuple[Tensor, DispatchPlan]]:
        """Return the ids of so many tokens, and a plan for each."""
        if tokens not in self._plans:
            self._plans = {tokens: [self._plan(tokens) for _ in range(LEAST_SETS)]}
        return [
            (ids[:tokens], out) for ids, out in zip(self._ids, self._plans[tokens], strict=True)
        ]

    def _plan(self, tokens: int) -> DispatchPlan:
        parts: list[Any] = [
            None if shape is None else torch.empty(shape, dtype=torch.int32, device=self.device)
            for shape in shapes(self.problem, tokens, None)
        ]
        return DispatchPlan(*parts)
