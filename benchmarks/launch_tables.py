"""Measure the rules of a shipped launch table on a dense grid of sizes, or find where the table in use has cliffs.

    python benchmarks/launch_tables.py measure KINDS OUT.json TABLE.json   # rules of the device's table, measured again
    python benchmarks/launch_tables.py cliffs KINDS OUT.json               # the table in use; exit code 1 where a time falls

KINDS are those of rules, with commas (``logits,row_sum``), or ``all``. ``measure`` does for every
rule what ``moe-routing tune`` does for one problem, and writes a table with these rules in
TABLE.json; rules that it does not measure stay. ``cliffs`` times the launch that the table gives
for each of ``TOKENS``, three times, and prints the worst places: a call that gets more than 10 %
faster when the number of tokens grows by a quarter is served by a wrong launch. Microseconds a
call: the median of CUDA-graph replays over rotating inputs. Kernels are compiled first, in as many
processes as there are cores.
"""

from __future__ import annotations

import datetime as dt
import json
import math
import os
import statistics
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import triton

from moe_routing import probe
from moe_routing_backends.triton.runtime.router import TritonRouter
from moe_routing_backends.triton.tuning.choose import table_for
from moe_routing_backends.triton.tuning.table import Step, key_of, to_json
from moe_routing_backends.triton.tuning.tune import TOKENS, _Inputs, candidates, measure, shown
from moe_routing_registry import RoutingProblem, RoutingSpec

if TYPE_CHECKING:
    from collections.abc import Callable

SPECS = {
    "logits": RoutingSpec(family="gemma4", renormalize=True, per_expert_scale=True),
    "row_sum": RoutingSpec(family="softmax_topk"),
    "sigmoid_bias": RoutingSpec(
        family="sigmoid_bias_topk", score="sigmoid", selection="scores_plus_bias", renormalize=True, scale=2.0
    ),
    "grouped": RoutingSpec(
        family="grouped_sigmoid_bias", score="sigmoid", selection="scores_plus_bias", renormalize=True,
        renorm_epsilon=1e-20, scale=2.5, num_groups=8, topk_groups=4, group_score="top2_sum",
    ),
    "bias": RoutingSpec(
        family="sqrtsoftplus_bias", score="sqrtsoftplus", selection="scores_plus_bias", renormalize=True, scale=1.5
    ),
}  # fmt: skip
"""A spec for each kind of rule."""
SIZES = ((64, 6), (128, 8), (160, 6), (256, 8), (384, 8), (512, 10))
CALLS, REPLAYS = 16, 15
CLIFF = 0.9
"""A time at a size, as a share of the time at the size a quarter below, that is no noise."""
WORST = 20


def problems(kinds: str) -> list[RoutingProblem]:
    """Return a problem for each rule of these kinds.

    The sizes that models have, and those of the table in use.
    """
    asked = {
        (kind, bits, *size)
        for kind, bits, size in product(SPECS, (16, 32), SIZES)
        if kind != "bias"
    }
    asked |= {
        (kind, bits, experts, 8 if width == 8 else 10)  # noqa: PLR2004 -- the short list
        for kind, bits, experts, width in _table().rules
    }
    found = {}
    for kind, bits, experts, topk in sorted(asked):
        dtype = "float32" if bits == 32 else "bfloat16"  # noqa: PLR2004 -- bits of float32
        problem = RoutingProblem(spec=SPECS[kind], num_experts=experts, topk=topk, dtype=dtype)
        found.setdefault(key_of(problem), problem)
    return [
        problem for key, problem in found.items() if kinds == "all" or key[0] in kinds.split(",")
    ]


def _table() -> Any:  # noqa: ANN401 -- a launch table
    gemma4 = RoutingProblem(spec=SPECS["logits"], num_experts=128, topk=8, dtype="bfloat16")
    return table_for(probe("cuda:0"), gemma4)


def graphed(work: Callable[[], object], device: torch.device) -> float:
    """Return the median microseconds of a call inside a replayed CUDA graph."""
    with torch.cuda.device(device):
        for _ in range(4):
            work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(CALLS):
                work()
        graph.replay()
        times = []
        for _ in range(REPLAYS):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / CALLS)
    return statistics.median(times)


def compile_share(mode: str, kinds: str, part: int, parts: int) -> None:
    """Compile a share of the kernels by a call each.

    The other processes of ``compile_all`` do the rest.
    """
    device = probe("cuda:0")
    every = []
    for problem in problems(kinds):
        used = [step.launch for step in table_for(device, problem).steps(problem)]
        every += [
            (problem, launch)
            for launch in dict.fromkeys(
                [*used, *(candidates(problem, device) if mode == "measure" else ())]
            )
        ]
    for problem, launch in every[part::parts]:
        try:
            _Inputs(problem, device, 2)._routed(  # noqa: SLF001 -- as tune does
                TritonRouter(problem, device, (Step(math.inf, launch),))
            )
        except Exception as error:  # noqa: BLE001, PERF203 -- what does not compile is named when it is measured
            print(f"{problem}: {shown(launch)}: {type(error).__name__}", file=sys.stderr)


def compile_all(mode: str, kinds: str) -> None:
    """Fill Triton's cache."""
    parts = max(1, (os.cpu_count() or 1) - 1)
    share = [sys.executable, __file__, "--compile", mode, kinds]
    for process in [subprocess.Popen([*share, str(part), str(parts)]) for part in range(parts)]:  # noqa: S603 -- this file itself
        process.wait()


def named(problem: RoutingProblem) -> str:
    """Name a problem in a few words."""
    return f"{'/'.join(map(str, key_of(problem)))} K={problem.topk}"


def measure_all(kinds: str, out: Path, table: Path) -> None:
    """Measure every rule; write what was measured, and the table, after each."""
    device, rules, results = probe("cuda:0"), dict(_table().rules), []
    for problem in problems(kinds):
        found = measure(problem, device, clock=graphed)
        rules[key_of(problem)] = found.steps
        results.append({"rule": named(problem), **found.to_dict()})
        gained = max((t.us_before / t.us for t in found.timed), default=1.0)
        print(
            named(problem),
            f"{len(found.steps)} steps, at most {gained:.2f} times faster than before",
            *found.wrong,
            flush=True,
        )
        write(out, "launches on a dense grid, for each rule of the table", rules=results)
        today = dt.datetime.now(tz=dt.timezone.utc).date().isoformat()
        versions = f"torch {torch.__version__.partition('+')[0]} and Triton {triton.__version__}"
        provenance = f"measured at {len(TOKENS)} sizes with {versions} on an {torch.cuda.get_device_name()} on {today}"
        table.write_text(to_json(device.arch or "", provenance, rules), encoding="utf-8")


def cliffs(kinds: str, out: Path) -> bool:
    """Time the table in use, print the worst places, and tell whether there is no cliff."""
    device, results, steps = probe("cuda:0"), [], []
    for problem in problems(kinds):
        router = TritonRouter(problem, device)
        runs = [
            {
                T: graphed(_Inputs(problem, device, T).turns(router), torch.device("cuda:0"))
                for T in TOKENS
            }
            for _ in range(3)
        ]
        times = {T: statistics.median(run[T] for run in runs) for T in TOKENS}
        results.append({"rule": named(problem), "us": {T: round(us, 3) for T, us in times.items()}})
        # Below 16 tokens the next size is more than a quarter away; a larger T that is faster is a
        # wrong step there too.
        steps += [
            (times[b] / times[a], named(problem), a, b, times[a], times[b])
            for a, b in zip(TOKENS, TOKENS[1:])  # noqa: B905, RUF007 -- neighbours
        ]
    steps.sort()
    for share, name, a, b, before, after in steps[:WORST]:
        print(f"{share:.3f}  {name}: T = {a} takes {before:.2f} us, T = {b} {after:.2f} us")
    write(
        out,
        "the table in use at sizes a quarter apart, median of three",
        cases=results,
        worst=[list(s) for s in steps[:WORST]],
    )
    return steps[0][0] >= CLIFF


def write(path: Path, what: str, **measured: object) -> None:
    """Write the measured values as JSON, with device, versions and date."""
    about = {
        "what": what,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": dt.datetime.now(tz=dt.timezone.utc).date().isoformat(),
    }
    path.write_text(json.dumps({**about, **measured}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    mode, kinds, *rest = sys.argv[1:]
    if mode == "--compile":
        compile_share(kinds, rest[0], *map(int, rest[1:]))
    else:
        compile_all(mode, kinds)
        if mode == "measure":
            measure_all(kinds, *map(Path, rest))
        else:
            sys.exit(0 if cliffs(kinds, Path(rest[0])) else 1)
