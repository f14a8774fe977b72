"""Measure the launches of ``plan`` on a dense grid of sizes, or make or judge its launch table.

    python benchmarks/plan_tables.py measure OUT.json
    python benchmarks/plan_tables.py table OUT.json TABLE.json
    python benchmarks/plan_tables.py cliffs TABLE.json OUT.json ...

``measure`` does for every rule what ``moe-routing tune plan`` does for one problem. It writes
OUT.json after each rule, and leaves out the rules that OUT.json holds. ``table`` reads what it
wrote, needs no GPU, and replaces these rules in the table that ships; TABLE.json holds the rules of
``route`` too. ``cliffs`` times what a table gives for each of ``TOKENS``, three times, and prints
the worst places: where a call gets more than 10 % faster when the number of pairs grows by a
quarter, a wrong launch serves the smaller number. Its exit code is 1 if there is one. Tables that
are to be compared are timed in one run, TABLE.json OUT.json for each. How launches are measured,
``launches.py`` says.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import launches

from moe_routing import probe
from moe_routing.planning import PlanProblem
from moe_routing_backends.triton.planning import kernels
from moe_routing_backends.triton.planning.launches import MOST_PAIRS, PlanLaunch
from moe_routing_backends.triton.planning.table import PlanTable, plan_key_of
from moe_routing_backends.triton.planning.tune import (
    PlanInputs,
    candidates,
    launch_at,
    measure,
    steps_of,
)
from moe_routing_backends.triton.tuning.choose import SHIPPED
from moe_routing_backends.triton.tuning.measure import TOKENS
from moe_routing_backends.triton.tuning.table import Table, parse, to_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from moe_routing_backends.triton.planning.launches import PlanStep
    from moe_routing_registry import DeviceInfo

SIZES = ((64, 6), (128, 8), (256, 8), (512, 10))
BLOCK = 64


def problems() -> list[PlanProblem]:
    """Return a problem for each rule: the sizes that models have, sorted and in blocks."""
    return [
        PlanProblem(num_experts=experts, topk=topk, **layout)
        for experts, topk in SIZES
        for layout in ({}, {"layout": "blocks", "block": BLOCK})
    ]


def shipped(arch: str | None) -> Table:
    """Return the table that ships for a device."""
    return read(SHIPPED / f"{arch}.json")


def read(path: Path) -> Table:
    """Read a table."""
    return parse(path.read_text(encoding="utf-8"), path.name)


def plans_of(table: Table) -> PlanTable:
    """Return the section of ``plan``."""
    return table.plans or sys.exit(f"{table.source}: expected a section plans, got none")


def named(problem: PlanProblem) -> str:
    """Name a problem in a few words."""
    return str(problem)


def shown(launch: PlanLaunch) -> str:
    """Name a launch by its fields."""
    return " ".join(map(str, launch))


def launch_of(words: str) -> PlanLaunch:
    """Return the launch that ``shown`` names."""
    return PlanLaunch(*map(int, words.split()))


def triton_functions() -> list[Any]:
    """Return the kernels."""
    return [
        kernels.moe_routing_plan,
        kernels.moe_routing_plan_count,
        kernels.moe_routing_plan_scan,
        kernels.moe_routing_plan_place,
    ]


def sizes(problem: PlanProblem, launch: PlanLaunch) -> list[int]:
    """Return sizes of which each compiles another kernel: for each power of two of programs."""
    most = min(
        TOKENS[-1] * problem.topk, MOST_PAIRS.get(launch.launches, TOKENS[-1] * problem.topk)
    )
    return [1 << n for n in range((most // problem.topk).bit_length())]


def tried(problem: PlanProblem, _device: DeviceInfo) -> list[PlanLaunch]:
    """Return the launches to try."""
    return candidates(problem)


def served(problem: PlanProblem, steps: Sequence[PlanStep], tokens: int) -> PlanLaunch:
    """Return the launch that serves so many tokens."""
    return launch_at(steps, tokens * problem.topk)


OPERATION = launches.Operation(
    kernels=triton_functions,
    inputs=PlanInputs,
    sizes=sizes,
    key=plan_key_of,
    named=named,
    shown=shown,
    candidates=tried,
    measure=measure,
    launch_at=served,
)


def make_table(held: Mapping[str, Any], path: Path) -> None:
    """Write the table that what was measured comes to.

    Rules that were not measured stay as they ship, and so do those of ``route``.
    """
    table = shipped(held["arch"])
    others = {} if table.plans is None else table.plans.rules
    measured = {
        tuple(rule["key"]): steps_of(launches.times_of(rule, launch_of), rule["K"])
        for rule in held["rules"]
    }
    provenance = launches.measured_on(held)
    if left := sorted(others.keys() - measured.keys()):
        rules = ", ".join(f"E = {experts} {layout}" for experts, layout in left)
        provenance += f"; {rules}: {plans_of(table).provenance}"
    plans = PlanTable(path.name, provenance, {**others, **measured})
    made = to_json(held["arch"], table.provenance, table.rules, plans=plans)
    launches.replace_file(path, made)


def main() -> None:
    """Do what the arguments say."""
    mode, *rest = sys.argv[1:]
    if mode == "measure":
        in_use = plans_of(shipped(probe("cuda:0").arch))
        what = (
            "microseconds of a call by rule, size and launch: launches, pairs a program, warps, "
            "pairs counted and placed at a time, groups"
        )
        done = launches.measure_all(OPERATION, problems(), in_use.steps, what, Path(rest[0]))
        sys.exit(0 if done else 1)
    if mode == "cliffs":
        tables = {
            Path(out): (plans.provenance, plans.steps)
            for name, out in zip(rest[::2], rest[1::2], strict=True)
            for plans in [plans_of(read(Path(name)))]
        }
        sys.exit(0 if launches.cliffs(OPERATION, problems(), tables) else 1)
    make_table(json.loads(Path(rest[0]).read_text(encoding="utf-8")), Path(rest[1]))


if __name__ == "__main__":
    main()
