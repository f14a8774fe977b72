"""``moe-routing report``."""

from __future__ import annotations

from pathlib import Path  # typer reads annotations while the program runs
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from moe_routing.cli._bench import INSTALL, have_matplotlib
from moe_routing.cli._show import Unusable, UsageError, console, print_json


def report(
    *,
    out: Annotated[Path, typer.Option(metavar="FILE.html", help="Where to write the page.")] = Path("moe-routing-report.html"),
    device: Annotated[
        str | None, typer.Option(help="The device to try: cpu, cuda:0, ...; the first accelerator, else the CPU.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs, instead of writing the page.")] = False,
) -> None:
    """Write a page about this machine: doctor's findings, conformance, a short benchmark. Takes a minute or two."""
    from moe_routing.report import gather, to_html

    if not as_json:
        if out.suffix != ".html":
            msg = f"--out: expected a name that ends in .html, got {str(out)!r}"
            raise UsageError(msg)
        if not out.resolve().parent.is_dir():
            msg = f"--out: expected a directory that exists, got {str(out.parent)!r}"
            raise UsageError(msg)
        if not have_matplotlib():
            msg = f"report: matplotlib, which draws the benchmark, is not installed: {INSTALL}"
            raise Unusable(msg)
    screen = console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    on = Console(stderr=True)
    with Progress(*columns, console=on, transient=True, disable=not on.is_terminal) as progress:
        task = progress.add_task("report", total=None)
        gathered = gather(
            device, lambda what, done, total: progress.update(task, description=what, completed=done, total=total)
        )
    if as_json:
        print_json(gathered.to_dict())
    else:
        out.write_text(to_html(gathered), encoding="utf-8")
        screen.print(f"Report: {out}", markup=False, soft_wrap=True)
    raise typer.Exit(0 if gathered.ok else 1)
