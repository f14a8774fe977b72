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
Microseconds a call: the median of CUDA-graph replays over rotating inputs. Kernels are compiled
first, in as many processes as there are cores.
"""

from __future__ import annotations

import datetime as dt
import json
import math
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import triton

from moe_routing import probe
from moe_routing_backends.triton.kernels import VARIANTS
from moe_routing_backends.triton.kernels.spec import Launch
from moe_routing_backends.triton.runtime.router import TritonRouter
from moe_routing_backends.triton.tuning.choose import SHIPPED
from moe_routing_backends.triton.tuning.table import Step, Table, key_of, parse, to_json
from moe_routing_backends.triton.tuning.measure import TOKENS, replayed
from moe_routing_backends.triton.tuning.tune import Inputs, candidates, launch_at, measure, steps_of
from moe_routing_registry import RoutingProblem, RoutingSpec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from moe_routing_backends.triton.tuning.table import Key
    from moe_routing_registry import DeviceInfo

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
        num_groups=8, topk_groups=4, group_score="top2_sum",
    ),
    "bias": RoutingSpec(
        family="sqrtsoftplus_bias", score="sqrtsoftplus", selection="scores_plus_bias",
        renormalize=True, scale=1.5,
    ),
}  # fmt: skip
"""A spec for each kind of rule."""
SIZES = ((64, 6), (128, 8), (160, 6), (256, 8), (384, 8), (512, 10))
Times = dict[tuple[int, Launch], list[float]]
"""Microseconds of a call in each run, by number of tokens and launch."""
RUNS = 3
"""How often ``cliffs`` times each size, in passes over all.

The least counts, for what disturbs a run only adds to it.
"""
CLIFF = 0.9
"""A time at a size, as a share of the time at a size up to a quarter below, that is no noise."""
QUARTER = 1.25
WORST = 20
KEPT = 2
"""Times of more than so many times the fastest are not kept."""


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


def settle_keys() -> None:
    """Let all processes find the same kernels in Triton's cache.

    A kernel's key depends on whose was computed before.
    """
    for variant in VARIANTS.values():
        _ = variant.kernel.cache_key


def compile_all(launches: Iterable[tuple[RoutingProblem, Launch]]) -> None:
    """Fill Triton's cache by a call of each, in processes."""
    settle_keys()
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 1) - 1), mp_context=spawned) as pool:
        longest_first = sorted(dict.fromkeys(launches), key=lambda asked: -asked[0].num_experts)
        for said in pool.map(_compile, longest_first):
            if said:
                print(said, file=sys.stderr)


def _compile(asked: tuple[RoutingProblem, Launch]) -> str:
    """Compile one kernel; return what it raised, which it does again when it is measured."""
    settle_keys()
    problem, launch = asked
    device = probe("cuda:0")
    try:
        Inputs(problem, device, 1).routed(
            TritonRouter(problem, device, (Step(math.inf, launch),)), 1
        )
    except Exception as error:  # noqa: BLE001 -- a launch that is too big for this device is an answer, not the end
        return f"{named(problem)}: {shown(launch)}: {type(error).__name__}"
    return ""


def named(problem: RoutingProblem) -> str:
    """Name a problem in a few words."""
    return f"{'/'.join(map(str, key_of(problem)))} K={problem.topk}"


def shown(launch: Launch) -> str:
    """Name a launch by its variant, rows a program, threads a row and warps."""
    return f"{launch.variant} {launch.block_t} {launch.threads_per_row} {launch.num_warps}"


def measure_all(kinds: str, out: Path) -> bool:
    """Measure the rules that OUT.json does not hold yet, and write it after each.

    Return whether all could be measured.
    """
    device, failed = probe("cuda:0"), False
    results = (
        _of_this_device(json.loads(out.read_text(encoding="utf-8")))["rules"]
        if out.exists()
        else []
    )
    held = {tuple(result["key"]) for result in results}
    left = [problem for problem in problems(kinds) if key_of(problem) not in held]
    in_use = read(shipped(device.arch))
    used = ((problem, step.launch) for problem in left for step in in_use.steps(problem))
    compile_all(
        [*used, *((problem, launch) for problem in left for launch in candidates(problem, device))]
    )
    for problem in left:
        try:
            found = measure(problem, device)
        except RuntimeError as error:  # the others are measured all the same
            print(f"{named(problem)}: {error}", flush=True)
            failed = True
            continue
        times = kept(found.times)
        results.append(
            {
                "key": key_of(problem),
                "K": problem.topk,
                **times,
                "wrong": found.wrong,
                "unusable": found.unusable,
            }
        )
        gained = max(
            found.times[T][now] / min(found.times[T].values()) for T, now in found.before.items()
        )
        print(
            named(problem),
            f"{len(steps_of(found.times))} steps, at most {gained:.2f} times faster",
            *found.wrong,
            flush=True,
        )
        what = (
            "microseconds of a call by rule, size and launch: variant, rows a program, threads a "
            "row, warps"
        )
        write(out, what, arch=device.arch, rules=results)
    return not failed


def make_table(held: Mapping[str, Any], path: Path) -> None:
    """Write the table that what was measured comes to.

    Rules that were not measured stay as they ship.
    """
    others, measured = (
        read(shipped(held["arch"])),
        {tuple(rule["key"]): steps_of(times_of(rule)) for rule in held["rules"]},
    )
    provenance = (
        f"measured at {len(TOKENS)} sizes and between, with {held['with']} "
        f"on an {held['device']} on {held['date']}"
    )
    if left := sorted({key[0] for key in others.rules.keys() - measured.keys()}):
        provenance += f"; {' and '.join(left)} in part: {others.provenance}"
    rules = {**others.rules, **measured}
    _replace(path, to_json(held["arch"], provenance, rules, plans=others.plans))


def times_of(rule: Mapping[str, Any]) -> dict[int, dict[Launch, float]]:
    """Return measured times as ``kept`` was given them."""
    launches = [
        Launch(variant, *map(int, numbers))
        for variant, *numbers in map(str.split, rule["launches"])
    ]
    return {
        int(T): {launches[int(place)]: us for place, us in of.items()}
        for T, of in rule["us"].items()
    }


def kept(times: Mapping[int, Mapping[Launch, float]]) -> dict[str, Any]:
    """Return what is kept of measured times.

    Launches, and for each size the times by the launch's place.
    """
    launches = {
        launch: str(place)
        for place, launch in enumerate(dict.fromkeys(a for of in times.values() for a in of))
    }
    us = {
        T: {
            launches[launch]: float(f"{us:.3g}")
            for launch, us in of.items()
            if us <= KEPT * min(of.values())
        }
        for T, of in times.items()
    }
    return {"launches": [shown(launch) for launch in launches], "us": us}


def without(variant: str, rules: Sequence[Mapping[str, Any]]) -> None:
    """Print for each rule how much slower the fastest launch of the other variants is.

    The size is the one at which that is worst, and the worst rule comes first.
    """
    losses = []
    for rule in rules:
        others = {
            T: [us for launch, us in of.items() if launch.variant != variant]
            for T, of in times_of(rule).items()
        }
        fastest = {T: min(of.values()) for T, of in times_of(rule).items()}
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


def cliffs(kinds: str, tables: Mapping[Path, Table]) -> bool:
    """Time tables, print the worst places of each, and tell whether there is no cliff."""
    device = probe("cuda:0")
    used = {
        problem: {out: table.steps(problem) for out, table in tables.items()}
        for problem in problems(kinds)
    }
    compile_all(
        (problem, step.launch)
        for problem, of in used.items()
        for steps in of.values()
        for step in steps
    )
    times = {problem: timed(problem, device, list(of.values())) for problem, of in used.items()}
    fallen = [
        fell(out, table.provenance, {p: (used[p][out], times[p]) for p in used})
        for out, table in tables.items()
    ]
    return not any(fallen)


def fell(
    out: Path, provenance: str, timed: Mapping[RoutingProblem, tuple[tuple[Step, ...], Times]]
) -> bool:
    """Write the times of a table, print the worst places, and tell whether there is a cliff."""
    results, falls = [], []
    for problem, (steps, times) in timed.items():
        us = {T: times[T, launch_at(steps, T)] for T in TOKENS}
        results.append({"rule": named(problem), "us": us})
        falls += [
            (
                round(after / before, 3),
                f"{named(problem)}: {at(steps, a)} {before:.2f} us, {at(steps, b)} {after:.2f} us",
            )
            for a, b, before, after in pairs({T: min(runs) for T, runs in us.items()})
        ]
    falls.sort()
    print(f"{out}: {sum(share < CLIFF for share, _ in falls)} falls")
    for share, place in falls[:WORST]:
        print(f"{share:.3f}  {place}")
    what = f"microseconds of a call by rule and size, in {RUNS} runs"
    write(out, what, table=provenance, cases=results, worst=falls[:WORST])
    return falls[0][0] < CLIFF


def timed(problem: RoutingProblem, device: DeviceInfo, tables: Sequence[Sequence[Step]]) -> Times:
    """Time what the tables give for each number of tokens."""
    asked = list(dict.fromkeys((T, launch_at(steps, T)) for T in TOKENS for steps in tables))
    routers = {
        launch: TritonRouter(problem, device, (Step(math.inf, launch),)) for _, launch in asked
    }
    inputs = Inputs(problem, device, TOKENS[-1])
    work = [inputs.turns(routers[launch], T) for T, launch in asked]
    runs = [[round(replayed(turns, inputs.device), 3) for turns in work] for _ in range(RUNS)]
    return {place: list(us) for place, us in zip(asked, zip(*runs, strict=True), strict=True)}


def at(steps: Sequence[Step], tokens: int) -> str:
    """Name a number of tokens, and what serves it."""
    return f"T = {tokens} ({shown(launch_at(steps, tokens))})"


def pairs(us: Mapping[int, float]) -> Iterable[tuple[int, int, float, float]]:
    """Yield each size with the next, and with all others up to a quarter above; and their times."""
    sizes = sorted(us)
    for place, a in enumerate(sizes):
        for b in sizes[place + 1 :]:
            if b == sizes[place + 1] or b <= QUARTER * a:
                yield a, b, us[a], us[b]


def versions() -> str:
    """Name what the kernels were compiled and launched with."""
    return f"torch {torch.__version__.partition('+')[0]} and Triton {triton.__version__}"


def today() -> str:
    """Return the date."""
    return dt.datetime.now(tz=dt.timezone.utc).date().isoformat()


def write(path: Path, what: str, **measured: object) -> None:
    """Write the measured values as JSON, with device, versions and date."""
    about = {
        "what": what,
        "device": torch.cuda.get_device_name(),
        "with": versions(),
        "date": today(),
    }
    _replace(path, json.dumps({**about, **measured}, separators=(",", ":")) + "\n")


def _of_this_device(held: dict[str, Any]) -> dict[str, Any]:
    here = {"device": torch.cuda.get_device_name(), "with": versions()}
    if {name: held[name] for name in here} != here:
        sys.exit(
            f"OUT.json: expected results of {here}, got those of {held['device']}, {held['with']}"
        )
    return held


def _replace(path: Path, text: str) -> None:
    """Write a file in one step, so that a run that is stopped leaves the whole of one."""
    new = path.with_suffix(".new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def main() -> None:
    """Do what the arguments say."""
    mode, *rest = sys.argv[1:]
    if mode == "measure":
        sys.exit(0 if measure_all(rest[0], Path(rest[1])) else 1)
    if mode == "cliffs":
        tables = {
            Path(out): read(Path(table)) for table, out in zip(rest[1::2], rest[2::2], strict=True)
        }
        sys.exit(0 if cliffs(rest[0], tables) else 1)
    held = json.loads(Path(rest[mode == "without"]).read_text(encoding="utf-8"))
    if mode == "table":
        make_table(held, Path(rest[1]))
    else:
        without(rest[0], held["rules"])


if __name__ == "__main__":
    main()
