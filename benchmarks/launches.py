"""What ``launch_tables.py`` and ``plan_tables.py`` share: measuring launches, judging tables.

Microseconds a call: the median of CUDA-graph replays over rotating inputs. Kernels are compiled
first, in as many processes as there are cores.
"""

from __future__ import annotations

import datetime as dt
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton

from moe_routing import probe
from moe_routing_backends.triton.tuning.measure import TOKENS, replayed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from moe_routing_registry import DeviceInfo

Times = dict[tuple[int, Any], list[float]]
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


class Operation(NamedTuple):
    """What is measured: functions of a script, which other processes import by name.

    :ivar kernels: returns Triton's functions, which cannot be sent to other processes.
    :ivar inputs: returns the ``Work`` of a problem, on a device, for up to so many tokens.
    :ivar sizes: returns the numbers of tokens that compile every kernel of a problem's launch.
    :ivar key: returns what identifies a problem's rule.
    :ivar named: names a problem in a few words.
    :ivar shown: names a launch by its values, with spaces.
    :ivar candidates: returns the launches to try for a problem on a device.
    :ivar measure: measures a problem's launches on a device.
    :ivar launch_at: returns the launch that serves so many tokens of a problem by steps.
    """

    kernels: Callable[[], Sequence[Any]]
    inputs: Callable[..., Any]
    sizes: Callable[..., Sequence[int]]
    key: Callable[..., tuple[Any, ...]]
    named: Callable[..., str]
    shown: Callable[..., str]
    candidates: Callable[..., Sequence[Any]]
    measure: Callable[..., Any]
    launch_at: Callable[..., Any]


def settle_keys(operation: Operation) -> None:
    """Let all processes find the same kernels in Triton's cache.

    A kernel's key depends on whose was computed before.
    """
    for kernel in operation.kernels():
        _ = kernel.cache_key


def compile_all(operation: Operation, launches: Iterable[tuple[Any, Any]]) -> None:
    """Fill Triton's cache by calls of each launch of a problem, in processes."""
    settle_keys(operation)
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 1) - 1), mp_context=spawned) as pool:
        longest_first = sorted(dict.fromkeys(launches), key=lambda asked: -asked[0].num_experts)
        for said in pool.map(partial(_compile, operation), longest_first):
            if said:
                print(said, file=sys.stderr)


def _compile(operation: Operation, asked: tuple[Any, Any]) -> str:
    """Compile the kernels of one launch; return what was raised.

    That is raised again when it is measured.
    """
    settle_keys(operation)
    problem, launch = asked
    sizes = operation.sizes(problem, launch)
    try:
        inputs = operation.inputs(problem, probe("cuda:0"), max(sizes))
        kernel = inputs.bound(launch)
        for T in sizes:
            inputs.turns(kernel, T)()
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001 -- a launch that is too big for this device is an answer, not the end
        return f"{operation.named(problem)}: {operation.shown(launch)}: {type(error).__name__}"
    return ""


def measure_all(
    operation: Operation,
    problems: Iterable[Any],
    in_use: Callable[[Any], Sequence[Any]],
    what: str,
    out: Path,
) -> bool:
    """Measure the problems whose rules OUT.json does not hold yet, and write it after each.

    Return whether all could be measured.

    :param in_use: returns the steps of a problem now.
    :param what: says what is written.
    """
    device, failed = probe("cuda:0"), False
    results = (
        _of_this_device(json.loads(out.read_text(encoding="utf-8")))["rules"]
        if out.exists()
        else []
    )
    held = {tuple(result["key"]) for result in results}
    left = [problem for problem in problems if operation.key(problem) not in held]
    used = ((problem, step.launch) for problem in left for step in in_use(problem))
    tried = (
        (problem, launch) for problem in left for launch in operation.candidates(problem, device)
    )
    compile_all(operation, [*used, *tried])
    for problem in left:
        try:
            found = operation.measure(problem, device)
        except RuntimeError as error:  # the others are measured all the same
            print(f"{operation.named(problem)}: {error}", flush=True)
            failed = True
            continue
        results.append(
            {
                "key": operation.key(problem),
                "K": problem.topk,
                **kept(found.times, operation.shown),
                "wrong": found.wrong,
                "unusable": found.unusable,
            }
        )
        gained = max(
            found.times[T][now] / min(found.times[T].values()) for T, now in found.before.items()
        )
        said = f"at most {gained:.2f} times faster"
        print(operation.named(problem), said, *found.wrong, flush=True)
        write(out, what, arch=device.arch, rules=results)
    return not failed


def kept(times: Mapping[int, Mapping[Any, float]], shown: Callable[[Any], str]) -> dict[str, Any]:
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


def times_of(
    rule: Mapping[str, Any], launch_of: Callable[[str], Any]
) -> dict[int, dict[Any, float]]:
    """Return measured times as ``kept`` was given them."""
    launches = [launch_of(words) for words in rule["launches"]]
    return {
        int(T): {launches[int(place)]: us for place, us in of.items()}
        for T, of in rule["us"].items()
    }


def cliffs(
    operation: Operation,
    problems: Iterable[Any],
    tables: Mapping[Path, tuple[str, Callable[[Any], Sequence[Any]]]],
) -> bool:
    """Time tables, print the worst places of each, and tell whether there is no cliff.

    :param tables: by the file to write: the provenance, and what returns a problem's steps.
    """
    device = probe("cuda:0")
    used = {
        problem: {out: steps(problem) for out, (_, steps) in tables.items()} for problem in problems
    }
    compile_all(
        operation,
        (
            (problem, step.launch)
            for problem, of in used.items()
            for steps in of.values()
            for step in steps
        ),
    )
    times = {
        problem: timed(operation, problem, device, list(of.values()))
        for problem, of in used.items()
    }
    fallen = [
        fell(operation, out, provenance, {p: (used[p][out], times[p]) for p in used})
        for out, (provenance, _) in tables.items()
    ]
    return not any(fallen)


def fell(
    operation: Operation,
    out: Path,
    provenance: str,
    timed: Mapping[Any, tuple[Sequence[Any], Times]],
) -> bool:
    """Write the times of a table, print the worst places, and tell whether there is a cliff."""
    results, falls = [], []
    for problem, (steps, times) in timed.items():
        launches = {T: operation.launch_at(problem, steps, T) for T in TOKENS}
        us = {T: times[T, launch] for T, launch in launches.items()}
        name = operation.named(problem)
        at = {T: f"T = {T} ({operation.shown(launch)})" for T, launch in launches.items()}
        results.append({"rule": name, "us": us})
        falls += [
            (round(after / before, 3), f"{name}: {at[a]} {before:.2f} us, {at[b]} {after:.2f} us")
            for a, b, before, after in pairs({T: min(runs) for T, runs in us.items()})
        ]
    falls.sort()
    print(f"{out}: {sum(share < CLIFF for share, _ in falls)} falls")
    for share, place in falls[:WORST]:
        print(f"{share:.3f}  {place}")
    what = f"microseconds of a call by rule and size, in {RUNS} runs"
    write(out, what, table=provenance, cases=results, worst=falls[:WORST])
    return falls[0][0] < CLIFF


def timed(
    operation: Operation,
    problem: Any,  # noqa: ANN401 -- of either operation
    device: DeviceInfo,
    tables: Sequence[Sequence[Any]],
) -> Times:
    """Time what the tables give for each number of tokens."""
    asked = list(
        dict.fromkeys(
            (T, operation.launch_at(problem, steps, T)) for T in TOKENS for steps in tables
        )
    )
    inputs = operation.inputs(problem, device, TOKENS[-1])
    kernels = {launch: inputs.bound(launch) for _, launch in asked}
    runs = [
        [round(replayed(inputs.turns(kernels[launch], T), inputs.device), 3) for T, launch in asked]
        for _ in range(RUNS)
    ]
    return {place: list(us) for place, us in zip(asked, zip(*runs, strict=True), strict=True)}


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


def write(path: Path, what: str, **measured: object) -> None:
    """Write the measured values as JSON, with device, versions and date."""
    about = {
        "what": what,
        "device": probe("cuda:0" if torch.cuda.is_available() else "cpu").name,
        "with": versions(),
        "date": dt.datetime.now(tz=dt.timezone.utc).date().isoformat(),
    }
    replace_file(path, json.dumps({**about, **measured}, separators=(",", ":")) + "\n")


def measured_on(held: Mapping[str, Any]) -> str:
    """Say how, where and when the results of ``write`` were measured: part of a provenance."""
    return (
        f"measured at {len(TOKENS)} sizes and between, with {held['with']} "
        f"on an {held['device']} on {held['date']}"
    )


def _of_this_device(held: dict[str, Any]) -> dict[str, Any]:
    here = {"device": torch.cuda.get_device_name(), "with": versions()}
    if {name: held[name] for name in here} != here:
        sys.exit(
            f"OUT.json: expected results of {here}, got those of {held['device']}, {held['with']}"
        )
    return held


def replace_file(path: Path, text: str) -> None:
    """Write a file in one step, so that a run that is stopped leaves the whole of one."""
    new = path.with_suffix(".new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)
