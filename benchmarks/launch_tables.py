"""Measure launches on a dense grid of sizes, or make or judge a launch table.

    python benchmarks/launch_tables.py measure KINDS OUT.json
    python benchmarks/launch_tables.py table OUT.json TABLE.json
    python benchmarks/launch_tables.py without VARIANT OUT.json
    python benchmarks/launch_tables.py cliffs KINDS TABLE.json OUT.json ...

``measure`` measures every rule of these kinds. ``table`` makes a table of the measurements, and of
the other rules that ship. ``without`` prints what the rules would lose without a variant.
``cliffs`` measures a table, and its exit code is 1 where a time falls.

KINDS are those of rules, with commas (``logits,row_sum``), or ``all``. ``measure`` does for every
rule what ``moe-routing tune`` does for one problem. It writes OUT.json after each rule, and leaves
out the rules that OUT.json holds, so that a second run goes on where the first was stopped.
``table`` and ``without`` read what ``measure`` wrote, and need no GPU. ``cliffs`` times what a
table gives for each of ``TOKENS``, three times, and prints the worst places: where a call gets more
than 10 % faster when the number of tokens grows by a quarter, a wrong launch serves the smaller
number. Tables that are to be compared (``compare_results.py``) are timed in one run, TABLE.json
OUT.json for each, since the times of one kernel in two processes differ by a few percent.
How launches are measured, ``launches.py`` says.
"""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import launches

from moe_routing import probe
from moe_routing_backends.triton.kernels import VARIANTS
from moe_routing_backends.triton.kernels.spec import Launch
from moe_routing_backends.triton.tuning.choose import SHIPPED
from moe_routing_backends.triton.tuning.table import Step, Table, key_of, parse, to_json
from moe_routing_backends.triton.tuning.tune import Inputs, candidates, launch_at, measure, steps_of
from moe_routing_registry import RoutingProblem, RoutingSpec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from moe_routing_backends.triton.tuning.table import Key

SPECS = {
    "logits": RoutingSpec(family="gemma4", renormalize=True, per_expert_scale=True),
    "row_sum": RoutingSpec(family="softmax_topk"),
    "sigmoid_bias": RoutingSpec(
        family="sigmoid_bias_topk", score="sigmoid", selection="scores_plus_bias",
        renormalize=True, scale=2.0,
    ),
    "grouped": RoutingSpec(
        family="grouped_sigmoid_bias", score="sigmoid", selection="scores_plus_bias",
        renormalize=True, renorm_epsilon=1e-20, scale=2.5,
        num_groups=8, topk_groups=4, group_sum=2,
    ),
    "bias": RoutingSpec(
        family="sqrtsoftplus_bias", score="sqrtsoftplus", selection="scores_plus_bias",
        renormalize=True, scale=1.5,
    ),
}  # fmt: skip
"""A spec for each kind of rule."""
SIZES = ((64, 6), (128, 8), (160, 6), (256, 8), (384, 8), (512, 10))


def problems(kinds: str) -> list[RoutingProblem]:
    """Return a problem for each rule of these kinds.

    The sizes that models have, and those of the shipped table.
    """
    asked = {
        (kind, bits, *size)
        for kind, bits, size in product(SPECS, (16, 32), SIZES)
        if kind != "bias"
    }
    rules = read(shipped(probe("cuda:0").arch)).rules
    asked |= {
        (kind, bits, experts, 8 if width == 8 else 10)  # noqa: PLR2004 -- the short list
        for kind, bits, experts, width in rules
    }
    found: dict[Key, RoutingProblem] = {}
    for kind, bits, experts, topk in sorted(asked):
        dtype = "float32" if bits == 32 else "bfloat16"  # noqa: PLR2004 -- bits of float32
        problem = RoutingProblem(spec=SPECS[kind], num_experts=experts, topk=topk, dtype=dtype)
        found.setdefault(key_of(problem), problem)
    return [
        problem for key, problem in found.items() if kinds == "all" or key[0] in kinds.split(",")
    ]


def shipped(arch: str | None) -> Path:
    """Return the path of the table that ships for a device."""
    return SHIPPED / f"{arch}.json"


def read(path: Path) -> Table:
    """Read a table."""
    return parse(path.read_text(encoding="utf-8"), path.name)


def named(problem: RoutingProblem) -> str:
    """Name a problem in a few words."""
    return f"{'/'.join(map(str, key_of(problem)))} K={problem.topk}"


def shown(launch: Launch) -> str:
    """Name a launch by its variant, rows a program, threads a row and warps."""
    return f"{launch.variant} {launch.block_t} {launch.threads_per_row} {launch.num_warps}"


def launch_of(words: str) -> Launch:
    """Return the launch that ``shown`` names."""
    variant, *numbers = words.split()
    return Launch(variant, *map(int, numbers))


def kernels() -> list[Any]:
    """Return the kernels of all variants."""
    return [variant.kernel for variant in VARIANTS.values()]


def sizes(_problem: RoutingProblem, _launch: Launch) -> tuple[int, ...]:
    """Return one size: a launch is one kernel."""
    return (1,)


def served(_problem: RoutingProblem, steps: Sequence[Step], tokens: int) -> Launch:
    """Return the launch that serves so many tokens."""
    return launch_at(steps, tokens)


def make_table(held: Mapping[str, Any], path: Path) -> None:
    """Write the table that what was measured comes to.

    Rules that were not measured stay as they ship.
    """
    others = read(shipped(held["arch"]))
    measured = {
        tuple(rule["key"]): steps_of(launches.times_of(rule, launch_of)) for rule in held["rules"]
    }
    provenance = launches.measured_on(held)
    if left := sorted({key[0] for key in others.rules.keys() - measured.keys()}):
        provenance += f"; {' and '.join(left)} in part: {others.provenance}"
    rules = {**others.rules, **measured}
    launches.replace_file(path, to_json(held["arch"], provenance, rules, plans=others.plans))


def without(variant: str, rules: Sequence[Mapping[str, Any]]) -> None:
    """Print for each rule how much slower the fastest launch of the other variants is.

    The size is the one at which that is worst, and the worst rule comes first.
    """
    losses = []
    for rule in rules:
        times = launches.times_of(rule, launch_of)
        others = {
            T: [us for launch, us in of.items() if launch.variant != variant]
            for T, of in times.items()
        }
        fastest = {T: min(of.values()) for T, of in times.items()}
        loss, tokens = max((min(us) / fastest[T], T) for T, us in others.items() if us)
        unknown = sum(not us for us in others.values())
        losses.append(
            (
                loss - 1,
                (
                    f"{'/'.join(map(str, rule['key']))} at T = {tokens}, "
                    f"no other measured at {unknown} sizes"
                ),
            )
        )
    for loss, place in sorted(losses, reverse=True):
        print(f"{loss:7.1%}  {place}")


OPERATION = launches.Operation(
    kernels=kernels,
    inputs=Inputs,
    sizes=sizes,
    key=key_of,
    named=named,
    shown=shown,
    candidates=candidates,
    measure=measure,
    launch_at=served,
)


def main() -> None:
    """Do what the arguments say."""
    mode, *rest = sys.argv[1:]
    if mode == "measure":
        in_use = read(shipped(probe("cuda:0").arch))
        what = (
            "microseconds of a call by rule, size and launch: variant, rows a program, threads a "
            "row, warps"
        )
        asked = problems(rest[0])
        done = launches.measure_all(OPERATION, asked, in_use.steps, what, Path(rest[1]))
        sys.exit(0 if done else 1)
    if mode == "cliffs":
        tables = {
            Path(out): (table.provenance, table.steps)
            for name, out in zip(rest[1::2], rest[2::2], strict=True)
            for table in [read(Path(name))]
        }
        sys.exit(0 if launches.cliffs(OPERATION, problems(rest[0]), tables) else 1)
    held = json.loads(Path(rest[mode == "without"]).read_text(encoding="utf-8"))
    if mode == "table":
        make_table(held, Path(rest[1]))
    else:
        without(rest[0], held["rules"])


if __name__ == "__main__":
    main()
