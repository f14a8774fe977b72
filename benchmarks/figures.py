"""Draw docs/figures from benchmarks/results: ``make figures``.

``python benchmarks/figures.py FOLDER`` draws into that folder. Each figure is drawn light and dark.

- ``h200-kernels``: kernels in CUDA graphs: ours and the full sort from the newest run of
  ``gpu.py``, the fastest peer from ``h200-peers.json``; all three measured in the same way.
- ``expert-parallel``: decode steps of a model with its experts on two and on four GPUs.
- ``h200-torch``: whole calls from the newest run of ``moe-routing bench`` that has torch.compile in
  it, and how many times our time the others take, beside the ratios published for the full sort on
  an A100.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.figure import Figure
from tables import RESULTS, ROOT, fastest_peer, newest, on_ranks, ours, peers

from moe_routing.bench import Case, Result, Row, Settings
from moe_routing.bench.plot import DARK, LIGHT, STYLE, Facet, draw, style_axes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes

    from moe_routing.bench.plot import Theme

PUBLISHED_A100 = {
    "eager": 12.68, "compile-default": 4.50, "compile-reduce-overhead": 4.97,
    "compile-max-autotune": 4.45,
}  # fmt: skip
"""How many times the full sort's time, as published for it."""


def kernels() -> Result:
    """Put gpu.py's run and the peers' into one result; E = 128, K = 8."""
    run, held = newest("whole_calls_do_bench"), peers()
    fastest = {
        (row["dtype"], row["T"]): fastest_peer(row)
        for row in held["rows"]
        if (row["E"], row["K"]) == (128, 8)
    }
    rows = []
    for case in ours().values():
        if (case["spec"], case["E"], case["K"]) != ("gemma4", 128, 8):
            continue
        of = Case("gemma4", case["dtype"], 128, 8, case["T"])
        moved = case["T"] * (128 * (2 if case["dtype"] == "bfloat16" else 4) + 8 * 8)
        ways = (("triton", True, case["us"]), ("full sort", False, case["full_sort_us"]))
        ways += (("fastest peer", False, fastest[case["dtype"], case["T"]]),)
        rows += [
            Row(
                case=of,
                mode="graph",
                implementation=way,
                is_backend=mine,
                rounds=(us,),
                bytes=moved,
            )
            for way, mine, us in ways
        ]
    return Result(
        settings=Settings(device="cuda:0", modes=("graph",)),
        device={"name": run["device"]},
        versions={"torch": run["torch"], "triton": run["triton"]},
        date=run["date"],
        copy_rate=held["copy_bytes_per_second"],
        launch_floor={"graph": held["empty_kernel_us"]},
        rows=rows,
    )


def draw_kernels(result: Result, theme: Theme) -> Figure:
    """Draw a panel a dtype."""
    figure = Figure(figsize=(9.4, 4.0), layout="constrained")
    for axes, dtype in zip(
        figure.subplots(1, 2, sharey=True), ("bfloat16", "float32"), strict=True
    ):
        rows = [row for row in result.rows if row.case.dtype == dtype]
        draw(axes, result, Facet(rows[0].case.title, "graph"), rows, theme)
        axes.set_title(
            f"{result.device['name']}, {dtype} logits, E = 128, K = 8",
            loc="left",
            color=theme.ink,
            fontsize=9,
        )
    return figure


def with_compile() -> Result:
    """Return the newest run of bench in which torch.compile was timed in whole calls."""
    for path in sorted(RESULTS.glob("h200-*.json"), reverse=True):
        if "schema_version" in (held := json.loads(path.read_text())) and "rows" in held:
            result = Result.read(path)
            result.rows = [
                row for row in result.rows if row.mode == "call" and row.case.dtype == "bfloat16"
            ]
            if any(row.implementation == "compile-default" and row.rounds for row in result.rows):
                return result
    msg = (
        "benchmarks/results: expected an h200-*.json of moe-routing bench "
        "with compile-default in mode call"
    )
    raise FileNotFoundError(msg)


def draw_torch(result: Result, theme: Theme) -> Figure:
    """Draw the times on the left, and how many times ours they are on the right."""
    figure = Figure(figsize=(9.4, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw(left, result, Facet(result.rows[0].case.title, "call"), result.rows, theme)
    left.set_title(
        f"whole calls, {result.device['name']}, bfloat16, E = 128, K = 8",
        loc="left",
        color=theme.ink,
        fontsize=9,
    )
    _ratios(right, result, theme)
    return figure


def _ratios(axes: Axes, result: Result, theme: Theme) -> None:
    for way, published in PUBLISHED_A100.items():
        rows = [
            row
            for row in result.rows
            if row.implementation == way and not row.is_backend and row.rounds
        ]
        ratios = [result.slowdown(row) or 0.0 for row in rows]
        colour = theme.others[way]
        axes.plot(
            [row.case.tokens for row in rows],
            ratios,
            marker="o",
            markersize=4,
            linewidth=1.4,
            color=colour,
            label=way,
        )
        axes.axhline(published, linestyle="--", linewidth=1, color=colour)
    axes.plot(
        [], [], "--", color=theme.ink, linewidth=1, label="published, A100: times the full sort"
    )
    axes.set_ylim(bottom=1)
    style_axes(axes, theme, "times the first backend")
    axes.set_title("how many times our time", loc="left", color=theme.ink, fontsize=9)


def draw_on_ranks(theme: Theme) -> Figure:
    """Draw decode steps by batch, a panel a number of GPUs."""
    runs = list(on_ranks())
    figure = Figure(figsize=(9.4, 4.0), layout="constrained")
    for axes, run in zip(figure.subplots(1, len(runs), sharey=True), runs, strict=True):
        stages = [stage for stage in run.stages if stage[0] == "decode"]
        backends, others = iter(theme.backends), iter(theme.others.values())
        for way in run.ways:
            ours = not way.startswith("transformers")
            axes.plot(
                [batch for _, batch in stages],
                [run.ms[way, stage] for stage in stages],
                marker="o" if ours else "s",
                markersize=4,
                linewidth=2.2 if ours else 1.4,
                color=next(backends if ours else others),
                label=way,
            )
        style_axes(axes, theme, "milliseconds a decode step")
        axes.set(xlabel="sequences of a rank", xticks=[batch for _, batch in stages])
        axes.set_yticks([10, 20, 50, 100, 200])
        axes.set_title(
            f"{run.held['ranks']} of {run.held['device']}", loc="left", color=theme.ink, fontsize=9
        )
    return figure


def figures() -> Iterator[tuple[str, Figure]]:
    """Draw everything, light and dark."""
    for suffix, plain in (("", LIGHT), ("-dark", DARK)):
        more = {
            "full sort": plain.others["baseline"],
            "fastest peer": plain.others["compile-default"],
        }
        theme = plain._replace(others={**plain.others, **more})
        yield f"h200-kernels{suffix}", draw_kernels(kernels(), theme)
        yield f"h200-torch{suffix}", draw_torch(with_compile(), theme)
        yield f"expert-parallel{suffix}", draw_on_ranks(plain)


def main() -> None:
    """Write the files."""
    folder = Path(sys.argv[1]) if sys.argv[1:] else ROOT / "docs" / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        for name, figure in figures():
            path = folder / f"{name}.svg"
            figure.savefig(path, format="svg", transparent=True, metadata={"Date": None})
            print(path)


if __name__ == "__main__":
    main()
