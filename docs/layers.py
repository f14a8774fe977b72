"""Draw docs/figures/layers.svg from the imports in the code: `python docs/layers.py`.

A test holds the picture to the code.

Each box is a package; the modules at the top of `moe_routing` are two boxes. An arrow means
"imports". Arrows that follow from others are left out. A box stands above everything that it
imports, so an import that goes up is an error here.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "figures" / "layers.svg"
SOURCES = {
    "moe_routing": ROOT,
    "moe_routing_backends": ROOT / "backends",
    "moe_routing_registry": ROOT / "registry",
}
LAYERS = (
    ("cli",),
    ("report",),
    ("doctor", "bench"),
    ("conformance", "integrations", "backends"),
    ("router",),
    ("reference", "formula", "probing"),
    ("registry()", "models"),
    ("families", "kernel"),
    ("moe_routing_registry",),
)
"""The boxes, from the top. Boxes of a layer do not import each other, except in `LATE`."""
SAYS = {
    "report": "one page of all",
    "cli": "the commands",
    "doctor": "what is here",
    "bench": "times",
    "conformance": "the contract and its kit",
    "integrations": "transformers, vLLM, ...",
    "backends": "eager, torch-compile, triton",
    "router": "get_router, gate, plan, ...",
    "reference": "oracle, error bounds, shadow mode",
    "formula": "the maths in PyTorch",
    "probing": "devices, toolchains",
    "registry()": "the process's registry",
    "models": "presets, configurations",
    "families": "formulas and operations",
    "kernel": "protocols, private interfaces",
    "moe_routing_registry": "specs, plug-ins, the choice",
}
TOP = {
    "_registry": "registry()",
    "_html": "moe_routing_registry",
    "families": "families",
    "operations": "families",
    "kernel": "kernel",
    "private_api": "kernel",
    "balancing.kernel": "kernel",
    "balancing.problem": "kernel",
    "gating.kernel": "kernel",
    "gating.problem": "kernel",
    "permutation.kernel": "kernel",
    "permutation.problem": "kernel",
    "planning.kernel": "kernel",
    "planning.problem": "kernel",
}
"""Modules of `moe_routing` that belong neither to the router nor to the box of their package.

`_html` needs nothing, and is not worth a box.
"""
LATE = {("models", "registry()"), ("registry()", "models")}
"""The registry reserves the models' names.

A configuration of a plug-in's model asks the registry, inside a function.
"""
FONT = 'font-family="sans-serif"'
WIDTH, HEIGHT, GAP, ROW, MARGIN = 206, 46, 26, 92, 20


def box_of(module: str) -> str:
    """Return the box of a module."""
    first, *rest = module.split(".")
    if first != "moe_routing":
        return "backends" if first == "moe_routing_backends" else first
    name = rest[0] if rest else ""
    for known in (name, ".".join(rest)):
        if known in TOP:
            return TOP[known]
    return "cli" if name == "__main__" else name if name in SAYS else "router"


def imports() -> set[tuple[str, str]]:
    """Return the pairs of boxes of which the first imports the second."""
    modules = {}
    for top, source in SOURCES.items():
        for path in (source / top).rglob("*.py"):
            parts = path.relative_to(source).with_suffix("").parts
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {
        pair
        for module, path in modules.items()
        for name in _imported(path)
        if (target := name if name in modules else name.rpartition(".")[0]) in modules
        and (pair := (box_of(module), box_of(target)))[0] != pair[1]
    }


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def arrows() -> set[tuple[str, str]]:
    """Return the imports that do not follow from others.

    :raises ValueError: an import goes up, or to a box of the same layer.
    """
    layer = {box: number for number, boxes in enumerate(LAYERS) for box in boxes}
    pairs = imports() - LATE
    for above, below in sorted(pairs):
        if layer[above] >= layer[below]:
            msg = f"{above} imports {below}, which is not below it"
            raise ValueError(msg)
    reach: dict[str, set[str]] = {}
    for boxes in reversed(LAYERS):
        for box in boxes:
            direct = {below for above, below in pairs if above == box}
            reach[box] = direct.union(*(reach[below] for below in direct)) if direct else set()
    follows = {(a, c) for a, b in pairs for c in reach[b]}
    return pairs - follows


def picture() -> str:
    """Return the SVG."""
    place: dict[str, tuple[int, int]] = {}
    widest = max(map(len, LAYERS))
    width = 2 * MARGIN + widest * WIDTH + (widest - 1) * GAP
    for number, boxes in enumerate(LAYERS):
        left = (width - len(boxes) * WIDTH - (len(boxes) - 1) * GAP) // 2
        for column, box in enumerate(boxes):
            place[box] = (left + column * (WIDTH + GAP), MARGIN + number * ROW)
    height = 2 * MARGIN + (len(LAYERS) - 1) * ROW + HEIGHT
    tip = '<path d="M0 0 8 4 0 8z" fill="#57606a"/>'
    marker = (
        '<marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" '
        f'orient="auto">{tip}</marker>'
    )
    view = f'viewBox="0 0 {width} {height}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {view} {FONT} text-anchor="middle">',
        f"<defs>{marker}</defs>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for above, below in sorted(arrows()):
        (x, y), (to_x, to_y) = place[above], place[below]
        ends = f'x1="{x + WIDTH // 2}" y1="{y + HEIGHT}" x2="{to_x + WIDTH // 2}" y2="{to_y}"'
        lines.append(f'<line {ends} stroke="#57606a" marker-end="url(#tip)"/>')
    for box, (x, y) in place.items():
        middle = x + WIDTH // 2
        edge = 'rx="6" fill="#f6f8fa" stroke="#1b1f24"'
        name = 'font-size="14" font-weight="bold" fill="#1b1f24"'
        lines += [
            f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" {edge}/>',
            f'<text x="{middle}" y="{y + 20}" {name}>{box}</text>',
            f'<text x="{middle}" y="{y + 37}" font-size="11" fill="#57606a">{SAYS[box]}</text>',
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
