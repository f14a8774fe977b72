"""``moe-routing list``."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.padding import Padding
from rich.text import Text

from moe_routing.cli._catalogue import catalogue
from moe_routing.cli._show import UsageError, console, print_json

if TYPE_CHECKING:
    from rich.console import Console

    from moe_routing.cli._catalogue import Entry

SCHEMA_VERSION = 1


def list_routers(
    containing: Annotated[
        str, typer.Argument(metavar="[TEXT]", help="Only names that contain this.")
    ] = "",
    *,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Also where each model's formula comes from.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """List families and models with formula and source, and operations with their backends."""
    from moe_routing._registry import registry

    found = [entry for entry in catalogue().values() if containing.lower() in entry.name]
    operations = [
        spec for name, spec in registry().operations.items() if containing.lower() in name
    ]
    best_first = sorted(registry().backends.values(), key=lambda b: (-b.priority, b.name))
    backends = {
        spec.name: [b.name for b in best_first if spec.name in b.factories] for spec in operations
    }
    if not found and not operations:
        msg = (
            f"no family, model or operation has {containing!r} in its name; "
            "`moe-routing list` shows all"
        )
        raise UsageError(msg)
    if as_json:
        print_json(
            {
                "schema_version": SCHEMA_VERSION,
                "routers": [entry.to_dict() for entry in found],
                "operations": [
                    {"name": spec.name, "summary": spec.summary, "backends": backends[spec.name]}
                    for spec in operations
                ],
            }
        )
        return
    screen = console()
    families = [entry for entry in found if entry.kind == "family"]
    models = [entry for entry in found if entry.kind == "model"]
    if families:
        screen.print(Text("Families", style="bold underline"))
        for entry in families:
            _block(screen, entry.name, entry.spec.formula, entry.source)
    if models:
        screen.print(Text("Models, by formula", style="bold underline"))
        for names, formula, sources in _by_formula(models):
            _block(screen, names, formula, *(sources if verbose or containing else ()))
    if operations:
        screen.print(Text("Operations, which backends compute", style="bold underline"))
        for spec in operations:
            computed_by = ", ".join(backends[spec.name]) or "none"
            _block(screen, spec.name, spec.summary, f"backends: {computed_by}")
    screen.print(
        "In formulas: l logits, b selection bias, E experts, K top-k, w weights, "
        "ids the experts chosen."
    )


def _by_formula(models: list[Entry]) -> list[tuple[str, str, list[str]]]:
    groups: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    for entry in models:
        groups[entry.spec.family, entry.spec.formula].append(entry)
    return [
        (
            ", ".join(e.name for e in group),
            formula,
            [f"{e.name}: {e.source}" for e in group if e.source],
        )
        for (_, formula), group in sorted(groups.items())
    ]


def _block(screen: Console, names: str, formula: str, *sources: str) -> None:
    screen.print(Text(names, style="bold"))
    screen.print(Padding(Text(formula, style="cyan"), (0, 0, 0, 4), expand=False))
    for source in sources:
        screen.print(Padding(Text(source, style="dim"), (0, 0, 0, 4), expand=False))
    screen.print()
