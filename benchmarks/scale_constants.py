"""Fit the constants of ``moe_routing.distributed.scale`` to what ``exchange.py`` measured.

    python benchmarks/scale_constants.py [--check]

It reads the results of ``exchange.py`` that ``docs/expert_parallel.md`` shows, prints each measured
row with the model's time, and writes the constants and the tables of ``docs/scale.md``. With
``--check`` it writes nothing, and exits with 1 if one is not as the results say.

Replays of graphs give the device's constants, by least squares of relative errors. Calls without a
graph give the host's time: of the measured times that which leaves the least sum of relative
errors, so that a few slow calls do not move it.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tables import on_gpus, with_table

from moe_routing.distributed.scale import (
    CONSTANTS,
    Constants,
    Deployment,
    DeviceTime,
    Network,
    Source,
    Way,
    changes_by_tokens,
    microseconds,
    traffic,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scale.md"
RESULTS = ROOT / "benchmarks" / "results"
K = 8
EXPERTS = {2816: 128, 7168: 256}
"""By columns, as ``exchange.py`` measures."""

NAME = re.compile(r"(all-to-all|symmetric) reduce=(none|rank)( padded)?")
"""Other rows are of other libraries."""


class Measured(NamedTuple):
    """A time of a result."""

    way: Way
    sizes: Deployment
    us: float


def read(paths: Iterable[Path]) -> tuple[list[Measured], tuple[Source, ...]]:
    """Return the rows of the results, and what they were measured on."""
    rows, sources = [], []
    for path in paths:
        held = json.loads(path.read_text())
        sources.append(
            Source(
                f"benchmarks/results/{path.name}",
                *(held[name] for name in ("device", "with", "date", "ranks")),
            )
        )
        rows += [row for one in held["results"] if (row := row_of(one, held)) is not None]
    return rows, tuple(sources)


def row_of(one: dict[str, Any], held: dict[str, Any]) -> Measured | None:
    """Return a row of a result, unless it is another library's."""
    found = NAME.fullmatch(one["name"])
    if found is None:
        return None
    transport, reduce = found[1], found[2]
    # The symmetric transport knows the most tokens, and moves no padding.
    padded = bool(found[3]) and transport == "all-to-all"
    columns, ranks = one["hidden_size"], held["ranks"]
    sizes = Deployment(
        tokens=one["tokens"],
        hidden_size=columns,
        topk=held["K"],
        num_experts=EXPERTS[columns],
        ranks=ranks,
        ranks_per_host=ranks,
    )
    way = Way(transport, reduce, padded=padded, graph=one["how"] == "graph")  # type: ignore[arg-type] # NAME's
    return Measured(way, sizes, one["microseconds"])


def fitted(rows: Sequence[Measured], sources: tuple[Source, ...]) -> Constants:
    """Return constants for these rows."""
    device = {}
    for key in sorted({(row.way.transport, row.way.reduce) for row in rows if row.way.graph}):
        replays = [row for row in rows if row.way[:2] == key and row.way.graph]
        device[key] = device_time(replays)
    made = Constants(device, {}, sources)
    host = {}
    for way in sorted({row.way for row in rows if not row.way.graph and row.way[:2] in device}):
        calls = [row for row in rows if row.way == way]
        host[way.transport, way.reduce, way.padded] = host_time(calls, made)
    return made._replace(host=host)


def device_time(rows: Sequence[Measured]) -> DeviceTime:
    """Fit ``fixed + peer (n - 1) + bytes / rate``; ``peer`` only if group sizes differ."""
    times = torch.tensor([row.us for row in rows], dtype=torch.float64)
    kilobytes = [traffic(row.sizes, row.way).bytes_within / 1e3 for row in rows]
    peers = [float(row.sizes.ranks - 1) for row in rows]
    columns = [[1.0] * len(rows), kilobytes, *([peers] if len(set(peers)) > 1 else [])]
    found = _solved(columns, times)
    if len(found) > 2 and found[2] < 0:  # noqa: PLR2004 -- more ranks take no less
        found = [*_solved(columns[:2], times), 0.0]
    peer = _rounded(found[2]) if len(found) > 2 else None  # noqa: PLR2004 -- the third
    return DeviceTime(_rounded(found[0]), peer, _rounded(1 / found[1]))


def _solved(columns: Sequence[Sequence[float]], times: torch.Tensor) -> list[float]:
    """Return the factors of the columns with the least squares of relative errors."""
    matrix = torch.tensor(columns, dtype=torch.float64).T / times[:, None]
    ones = torch.ones(len(times), 1, dtype=torch.float64)
    factors: list[float] = torch.linalg.lstsq(matrix, ones).solution.flatten().tolist()
    return factors


def host_time(rows: Sequence[Measured], device: Constants) -> float:
    """Return the host's time of calls that the device makes too."""
    alone = [_modelled(row._replace(way=row.way._replace(graph=True)), device) for row in rows]

    def off(host: float) -> tuple[float, float]:
        times = zip(rows, alone, strict=True)
        lost = sum(abs(math.log(max(host, least) / row.us)) for row, least in times)
        # Of an even number of calls both in the middle lose as much, and the last bits of a sum
        # differ between versions of Python: the less is taken.
        return round(lost, 9), host

    return _rounded(min((row.us for row in rows), key=off))


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _modelled(row: Measured, constants: Constants) -> float:
    took = microseconds(row.sizes, row.way, constants, Network())
    if took is None:
        msg = f"{row.way}: expected replays of a graph in the results too, got none"
        raise SystemExit(msg)
    return took


def error(row: Measured, constants: Constants) -> float:
    """Return by which share of the measured time the model is above it."""
    return _modelled(row, constants) / row.us - 1


def summed_up(rows: Iterable[Measured], constants: Constants) -> tuple[str, str]:
    """Return the median and the worst relative error."""
    off = [abs(error(row, constants)) for row in rows]
    return f"{statistics.median(off):.0%}", f"{max(off):.0%}"


def in_docs(rows: Sequence[Measured], constants: Constants) -> Iterable[str]:
    """Yield the table of the constants."""
    for file, device, versions, date, ranks in constants.sources:
        yield f"- `{file}`: {ranks} ranks on one host, {device}, {versions}, {date}"
    yield ""
    yield (
        "| way | fixed, us | a further rank, us | rate, GB/s | host, us | rows measured | "
        "median error | worst error |"
    )
    yield "|---|" + "---:|" * 7
    for way in sorted({row.way for row in rows}, key=str):
        fixed, peer, rate = constants.device[way[:2]]
        further = "not measured" if peer is None else f"{peer:,}"
        host = "" if way.graph else f"{constants.host[way[:3]]:,}"
        of_way = [row for row in rows if row.way == way]
        cells = (way, fixed, further, rate, host, len(of_way), *summed_up(of_way, constants))
        yield f"| {' | '.join(map(str, cells))} |"
    yield f"| all | | | | | {len(rows)} | {' | '.join(summed_up(rows, constants))} |"
    yield ""
    yield right_choices(rows, constants)
    yield from from_fewer_ranks(rows)


def right_choices(rows: Sequence[Measured], constants: Constants) -> str:
    """Say how often the model names the way that was measured to be the fastest."""
    of_sizes: dict[Deployment, list[Measured]] = {}
    for row in rows:
        of_sizes.setdefault(row.sizes, []).append(row)
    lost = []
    for measured in of_sizes.values():
        named = min(measured, key=lambda row: _modelled(row, constants))
        lost.append(named.us / min(row.us for row in measured) - 1)
    right = sum(loss == 0 for loss in lost)
    worst = f", and else one that takes up to {max(lost):.0%} longer" if right < len(lost) else ""
    return f"Of {len(lost)} measured sizes the model names the fastest way for {right}{worst}."


def from_fewer_ranks(rows: Sequence[Measured]) -> Iterable[str]:
    """Yield what constants of the smallest group say of the larger ones."""
    groups = sorted({row.sizes.ranks for row in rows})
    fewest = [row for row in rows if row.sizes.ranks == groups[0]]
    constants = fitted(fewest, ())
    for ranks in groups[1:]:
        larger = [
            row for row in rows if row.sizes.ranks == ranks and row.way[:2] in constants.device
        ]
        median, worst = summed_up(larger, constants)
        yield ""
        yield (
            f"Constants that are fitted to {groups[0]} ranks alone miss the times of {ranks} ranks "
            f"by {median} (median) and {worst} (worst)."
        )


def fastest_ways(constants: Constants) -> Iterable[str]:
    """Yield the table of the fastest ways of DeepSeek-V3's layer."""
    yield "| ranks | fastest way, by tokens of a rank |"
    yield "|---:|---|"
    for ranks in (2, 4, 8, 16, 64, 512):
        sizes = Deployment(tokens=1, hidden_size=7168, topk=K, num_experts=256, ranks=ranks)
        changes = changes_by_tokens(sizes, constants)
        yield f"| {ranks} | {'; '.join(f'from {start:,}: `{way}`' for start, way in changes)} |"


def main() -> None:
    """Fit, print and write."""
    rows, sources = read(RESULTS / held["file"] for held in on_gpus("exchange"))
    constants = fitted(rows, sources)
    for row in rows:
        print(
            f"{row.way!s:35} {row.sizes.ranks} ranks, T={row.sizes.tokens:<5} "
            f"H={row.sizes.hidden_size}: measured {row.us:8.1f}, model "
            f"{_modelled(row, constants):8.1f} us, {error(row, constants):+5.0%}"
        )
    tables = {"constants": list(in_docs(rows, constants)), "fastest": list(fastest_ways(constants))}
    print("\n".join(itertools.chain(*tables.values())))
    check = "--check" in sys.argv[1:]
    stale = not kept(CONSTANTS, json.dumps(constants.to_dict(), indent=1) + "\n", check=check)
    text = PAGE.read_text(encoding="utf-8")
    for name, lines in {**tables, "example": example()}.items():
        text = with_table(text, name, lines)
    stale |= not kept(PAGE, text, check=check)
    if check and stale:
        sys.exit("not as the results say: make figures")


def kept(path: Path, text: str, *, check: bool) -> bool:
    """Return whether the file holds this text; unless it is a check, write it."""
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return True
    if not check:
        path.write_text(text, encoding="utf-8")
    return False


def example() -> Iterable[str]:
    """Yield what the command prints with the constants that are written."""
    options = ["scale", "--ranks", "8,64", "--network-rate", "25"]
    done = subprocess.run(  # noqa: S603 -- ours
        [sys.executable, "-m", "moe_routing", *options],
        check=True,
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "COLUMNS": "150", "PYTHONIOENCODING": "utf-8"},
    )
    yield "```console"
    yield f"$ moe-routing {' '.join(options)}"
    yield from (line.rstrip() for line in done.stdout.splitlines())
    yield "```"


if __name__ == "__main__":
    main()
