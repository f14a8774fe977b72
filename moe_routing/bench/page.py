"""A ``Result`` as HTML: a drawing and a table for each problem, dtype and mode."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

from moe_routing._html import escape, page, table
from moe_routing_registry.containment import PluginFailure, contained

if TYPE_CHECKING:
    from moe_routing.bench._result import Result, Row
    from moe_routing.bench.plot import Facet

COLUMNS = ("T", "implementation", "us", "±", "GB/s", "of a copy", "times the first backend")
"""Of every table of a result, here and on the terminal."""


def cells(result: Result, row: Row) -> tuple[str, ...]:
    """Return a timed row as text, in the order of ``COLUMNS``.

    The share is of the device's own copy rate; the last cell says how many times the first
    backend's time this is.
    """
    time, rate, share, slowdown = (
        row.microseconds,
        row.bytes_per_second,
        result.share(row),
        result.slowdown(row),
    )
    return (
        f"{row.case.tokens:,}",
        row.label,
        "" if time is None else f"{time:,.2f}",
        f"{row.spread:,.2f}",
        "" if rate is None else f"{rate / 1e9:,.3g}",
        "" if share is None else f"{share:.1%}",
        "" if slowdown is None else f"{slowdown:,.2f}",
    )


def about(result: Result) -> str:
    """Say in a line what it was measured on."""
    device, versions = (
        result.device,
        ", ".join(f"{name} {version}" for name, version in result.versions.items() if version),
    )
    threads = f", {device['threads']} thread" if device["threads"] else ""
    floors = ", ".join(f"{time:.2f} us ({mode})" for mode, time in result.launch_floor.items())
    return (
        f"{device['name']} {device['arch']}{threads}; {versions}; {result.date}. "
        f"A large copy moves {result.copy_rate / 1e9:,.0f} GB/s; "
        f"the smallest launch takes {floors}. "
        "Medians of rounds that take turns, ± half their range."
    )


def remarks(rows: list[Row]) -> dict[str, list[str]]:
    """Say what was not timed: ``"wrong"`` and ``"not measured"``, a sentence each, none twice."""
    wrong = [f"{row.label}: {row.case}: {sentence}" for row in rows for sentence in row.wrong]
    skipped = [f"{row.label}: {row.skipped}" for row in rows if row.skipped]
    return {"wrong": list(dict.fromkeys(wrong)), "not measured": list(dict.fromkeys(skipped))}


def sections(result: Result, heading: str = "h2") -> list[str]:
    """Return HTML: what the run was measured on, then a drawing and a table for each facet.

    Where matplotlib is missing or cannot draw, the page says so in place of the drawing.

    :param heading: the HTML element of each facet's heading.
    """
    from moe_routing.bench.plot import facets

    parts = [f"<p>{escape(about(result))}</p>"]
    for facet, rows in facets(result).items():
        timed = table(COLUMNS, [cells(result, row) for row in rows if row.rounds])
        said = "".join(
            f"<p class='{'failed' if kind == 'wrong' else 'declined'}'>"
            f"{kind}: {escape(sentence)}</p>"
            for kind, sentences in remarks(rows).items()
            for sentence in sentences
        )
        parts.append(
            f"<{heading}>{escape(facet)}</{heading}>"
            f"<div class='plot'>{_picture(result, facet)}<div>{timed}{said}</div></div>"
        )
    return parts


def to_html(result: Result) -> str:
    """Return one page."""
    return page("moe-routing bench", ["<h1>moe-routing bench</h1>", *sections(result)])


def _picture(result: Result, facet: Facet) -> str:
    from moe_routing.bench.plot import DARK, LIGHT, svg

    try:
        with contained("drawing"):
            dark, light = (_data(svg(result, facet, theme)) for theme in (DARK, LIGHT))
    except PluginFailure as failure:
        return f"<p class='declined'>no drawing: {escape(failure.sentence)}</p>"
    source = f"<source srcset='{dark}' media='(prefers-color-scheme: dark)'>"
    return f"<picture>{source}<img src='{light}' alt='{escape(facet)}: time against T'></picture>"


def _data(drawing: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(drawing.encode()).decode()
