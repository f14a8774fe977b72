"""Draw docs/figures/{block,tile_*}.svg, the figures of README and kernels.md.

``python docs/drawings.py`` writes them; a test holds the figures to this file.

A drawing has a grid of logits, where a row is a token, a column an expert and a colour a thread of
one program, and the steps that the program takes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

FIGURES = Path(__file__).parent / "figures"
THREADS = ("#a6cee3", "#b2df8a", "#fdbf6f", "#cab2d6", "#fb9a99", "#ffff99", "#d9d9d9", "#80cdc1")
INK, GREY, OURS, THEIRS = "#1b1f24", "#57606a", "#ddf4ff", "#f6f8fa"
CELL, EXPERTS, STEP_WIDTH, STEP_HEIGHT, GAP, MARGIN = 18, 16, 330, 34, 12, 16


class Tile(NamedTuple):
    """A kernel of ``route``: who reads which logit of a program's rows, and what follows."""

    rows: int
    thread: Callable[[int, int], int]
    said: str
    steps: Sequence[str]


TILES = {
    "cooperative": Tile(
        2,
        lambda _row, expert: expert // 2,
        "the threads of a program share its rows",
        (
            "key = logit and complement of the index, in one integer",
            "K times: the maximum of the row over all threads",
            "remove it; its index is the next expert",
            "weights of the K selected experts",
        ),
    ),
    "thread_per_row": Tile(
        6,
        lambda row, _expert: row,
        "it has a row, and takes 8 experts at a time",
        (
            "load 8 experts (16 bytes) and sort their keys",
            "merge into the list of the best, in registers",
            "next 8 experts, until the row ends",
            "exact keys of the K best; weights",
        ),
    ),
    "block": Tile(
        4,
        lambda _row, expert: expert // 2,
        "it reads and scores what lies in memory so",
        (
            "scores: a thread has the same experts in every row",
            "through shared memory: a thread gets a row's group",
            "sort and merge lists, by group; drop groups; merge the rest",
            "rows whose keys are too near are routed again, exactly",
        ),
    ),
    "filter": Tile(
        4,
        lambda row, expert: 2 * row + expert // 8,
        "it holds two experts in each register",
        (
            "networks over pairs find a threshold that K experts reach",
            "one comparison for two experts: a bit mask of those that reach it",
            "read these (K, and one or two more) again",
            "sort their exact keys; weights",
        ),
    ),
}
BLOCK = (
    ("gate", "norm, scale, linear layer, top-k", "hidden [T, H] to weights, ids [T, K]", True),
    ("plan", "places of all pairs, by expert", "ids to order, inverse, counts, offsets", True),
    ("dispatch", "rows to the ranks of their experts", "with several devices only", True),
    ("permute", "rows in the order of the plan", "[T, H] to [T * K, H]; fp8 on request", True),
    ("experts", "up, activation, down", "your grouped product or engine", False),
    ("combine", "weighted sum of each token's rows", "[T * K, H] to [T, H]", True),
)
"""The steps of a mixture-of-experts block: name, what it does, what comes and goes, and if it is
ours."""


def drawings() -> dict[Path, str]:
    """Return each figure's path and SVG."""
    tiles = {f"tile_{name}": _tile(tile) for name, tile in TILES.items()}
    figures = {"block": _block(), **tiles}
    return {FIGURES / f"{name}.svg": svg for name, svg in figures.items()}


def _tile(tile: Tile) -> str:
    left, top = MARGIN, MARGIN + 22
    grid_width = EXPERTS * CELL
    height = max(tile.rows * CELL + 70, len(tile.steps) * (STEP_HEIGHT + GAP)) + 2 * MARGIN
    drawn = [_text(left, MARGIN + 10, "one program's logits: rows are tokens, columns experts", 12)]
    for row in range(tile.rows):
        for expert in range(EXPERTS):
            colour = THREADS[tile.thread(row, expert) % len(THREADS)]
            x, y = left + expert * CELL, top + row * CELL
            drawn.append(_box(x, y, CELL, CELL, colour, "#fff"))
    drawn.append(_box(left, top, grid_width, tile.rows * CELL, "none", INK))
    for line, said in enumerate(("a colour is a thread:", tile.said)):
        drawn.append(_text(left, top + tile.rows * CELL + 18 + 16 * line, said, 12, GREY))
    x = left + grid_width + 70
    for number, step in enumerate(tile.steps):
        y = MARGIN + number * (STEP_HEIGHT + GAP)
        if number:
            drawn.append(_arrow(x + 20, y - GAP, x + 20, y))
        drawn.append(_box(x, y, STEP_WIDTH + 90, STEP_HEIGHT, THEIRS, INK, 6))
        drawn.append(_text(x + 12, y + 21, f"{number + 1}. {step}", 12))
    drawn.append(_arrow(left + grid_width + 12, top + CELL, x - 8, top + CELL))
    return _svg(x + STEP_WIDTH + 90 + MARGIN, height, drawn)


def _block() -> str:
    height, width, drawn = 44, 640, []
    for number, (name, does, shapes, is_ours) in enumerate(BLOCK):
        y = MARGIN + number * (height + 18)
        if number:
            drawn.append(_arrow(MARGIN + 30, y - 18, MARGIN + 30, y))
        drawn += [
            _box(MARGIN, y, width, height, OURS if is_ours else THEIRS, INK, 6),
            _text(MARGIN + 14, y + 27, name, 14, INK, bold=True),
            _text(MARGIN + 110, y + 27, does, 12),
            _text(MARGIN + 350, y + 27, shapes, 12, GREY),
        ]
    y = MARGIN + len(BLOCK) * (height + 18) + 4
    for x, colour, said in ((0, OURS, "moe_routing"), (140, THEIRS, "PyTorch's, or an engine's")):
        drawn.append(_box(MARGIN + x, y, 16, 16, colour, INK))
        drawn.append(_text(MARGIN + x + 24, y + 13, said, 12))
    return _svg(width + 2 * MARGIN, y + 16 + MARGIN, drawn)


def _text(  # noqa: PLR0913 -- those of a text
    x: int, y: int, said: str, size: int, colour: str = INK, *, bold: bool = False
) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}"{weight}>{said}</text>'


def _box(  # noqa: PLR0913, PLR0917 -- those of a rectangle
    x: int, y: int, width: int, height: int, fill: str, edge: str, round_: int = 0
) -> str:
    place = f'x="{x}" y="{y}" width="{width}" height="{height}" rx="{round_}"'
    return f'<rect {place} fill="{fill}" stroke="{edge}"/>'


def _arrow(x: int, y: int, to_x: int, to_y: int) -> str:
    ends = f'x1="{x}" y1="{y}" x2="{to_x}" y2="{to_y}"'
    return f'<line {ends} stroke="{GREY}" marker-end="url(#tip)"/>'


def _svg(width: int, height: int, drawn: Sequence[str]) -> str:
    tip = f'<path d="M0 0 8 4 0 8z" fill="{GREY}"/>'
    shape = 'viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
    return "\n".join(
        [
            f'{head} width="{width}" height="{height}" font-family="sans-serif">',
            f'<defs><marker id="tip" {shape}>{tip}</marker></defs>',
            f'<rect width="{width}" height="{height}" fill="#fff"/>',
            *drawn,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    for path, svg in drawings().items():
        path.write_text(svg, encoding="utf-8")
