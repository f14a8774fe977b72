"""Drawings of a ``Result``: time against T on logarithmic axes.

A drawing also has the floors that nothing gets under. matplotlib is the extra ``bench``; it is
imported here and nowhere else.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, NamedTuple

from moe_routing_registry.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from moe_routing.bench._result import Result, Row

_WIDTH, _HEIGHT = 4.7, 4.0
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a device's name is text
    "svg.hashsalt": "moe-routing",  # the same result gives the same file
}
_FLOORS = ("a copy of the same bytes", "the smallest launch")
_MARKERS = "osD^vP*X"


class Theme(NamedTuple):
    """Colours of the page around, and of the lines."""

    paper: str
    ink: str
    line: str
    backends: tuple[str, ...]
    others: dict[str, str]


LIGHT = Theme(
    "#ffffff", "#1b1f24", "#d0d7de", ("#0969da", "#0a3069", "#54aeff"),
    {
        "baseline": "#bc4c00", "eager": "#57606a", "compile-default": "#1a7f37",
        "compile-reduce-overhead": "#8250df", "compile-max-autotune": "#bf3989",
        "sort": "#57606a", "sort-int32": "#bc4c00",
    },
)  # fmt: skip
DARK = Theme(
    "#0d1117", "#e6edf3", "#30363d", ("#58a6ff", "#a5d6ff", "#1f6feb"),
    {
        "baseline": "#f0883e", "eager": "#8b949e", "compile-default": "#3fb950",
        "compile-reduce-overhead": "#bc8cff", "compile-max-autotune": "#f778ba",
        "sort": "#8b949e", "sort-int32": "#f0883e",
    },
)  # fmt: skip


class Facet(NamedTuple):
    """What one drawing shows."""

    problem: str
    mode: str

    def __str__(self) -> str:
        """Say it in a line."""
        return f"{self.problem}, mode {self.mode}"


def facets(result: Result) -> dict[Facet, list[Row]]:
    """Sort rows into drawings, in the order in which they were measured."""
    found: dict[Facet, list[Row]] = {}
    for row in result.rows:
        found.setdefault(Facet(row.case.title, row.mode), []).append(row)
    return found


def svg(result: Result, facet: Facet, theme: Theme) -> str:
    """Draw one facet without background and title, which the page has."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
        draw(figure.subplots(), result, facet, facets(result)[facet], theme)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return text.getvalue()


def save_png(result: Result, path: Path) -> None:
    """Draw every facet, in one row, light."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    shown = facets(result)
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    with mpl.rc_context(STYLE):
        figure: Figure = Figure(
            figsize=(_WIDTH * columns, _HEIGHT * rows), layout="constrained", facecolor=LIGHT.paper
        )
        all_axes = figure.subplots(rows, columns, squeeze=False).flat
        for axes, (facet, facet_rows) in zip(all_axes, shown.items(), strict=False):
            draw(axes, result, facet, facet_rows, LIGHT)
            axes.set_title(
                printable(f"{facet}\n{result.device['name']}"),
                loc="left",
                color=LIGHT.ink,
                fontsize=9,
            )
        for axes in list(all_axes)[len(shown) :]:
            axes.set_axis_off()
        figure.savefig(path, dpi=150)


def draw(axes: Axes, result: Result, facet: Facet, rows: Iterable[Row], theme: Theme) -> None:
    """Draw one facet: a line for each implementation, the copy floor and the launch floor."""
    timed = [row for row in rows if row.microseconds is not None]
    implementations: dict[str, list[Row]] = {}
    for row in timed:
        implementations.setdefault(row.label, []).append(row)
    backends = 0
    for number, (label, drawn_rows) in enumerate(implementations.items()):
        if drawn_rows[0].is_backend:
            colour, width = theme.backends[backends % len(theme.backends)], 2.2
            backends += 1
        else:
            colour, width = theme.others.get(drawn_rows[0].implementation, theme.ink), 1.4
        tokens, times = (
            [row.case.tokens for row in drawn_rows],
            [row.microseconds or 0.0 for row in drawn_rows],
        )
        axes.errorbar(
            tokens, times, yerr=[row.spread for row in drawn_rows],
            label=printable(label), color=colour, linewidth=width,
            marker=_MARKERS[number % len(_MARKERS)], markersize=4, capsize=2, elinewidth=1,
            zorder=3 if drawn_rows[0].is_backend else 2,
        )  # fmt: skip
    moved = {row.case.tokens: row.bytes for row in timed}
    floor = [moved[tokens] / result.copy_rate * 1e6 for tokens in sorted(moved)]
    launch = result.launch_floor[facet.mode]
    times_of_all = [launch, *(row.microseconds or launch for row in timed)]
    axes.plot(sorted(moved), floor, "--", color=theme.ink, linewidth=1, alpha=0.6, label=_FLOORS[0])
    axes.axhline(launch, linestyle=":", color=theme.ink, linewidth=1, alpha=0.6, label=_FLOORS[1])
    axes.set_ylim(min(times_of_all) / 2, max(times_of_all) * 2)
    style_axes(axes, theme, "microseconds a call")


def style_axes(axes: Axes, theme: Theme, what: str) -> None:
    """Make both axes logarithmic, with plain numbers, the theme's colours, and the legend below."""
    axes.set(xscale="log", yscale="log", xlabel="tokens T", ylabel=what)
    axes.grid(visible=True, which="major", color=theme.line, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_facecolor("none")
    axes.tick_params(which="both", colors=theme.ink)
    axes.minorticks_off()
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:,g}")
        axis.label.set_color(theme.ink)
    for spine in axes.spines.values():
        spine.set_color(theme.line)
    handles, labels = axes.get_legend_handles_labels()
    # Implementations first, as they were measured.
    order = sorted(range(len(labels)), key=lambda at: labels[at] in _FLOORS)
    axes.legend(
        [handles[at] for at in order], [labels[at] for at in order],
        loc="upper center", bbox_to_anchor=(0.45, -0.14), ncols=2,
        frameon=False, labelcolor=theme.ink, fontsize=8,
    )  # fmt: skip
