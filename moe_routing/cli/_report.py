"""``moe-routing report``."""

from __future__ import annotations

from pathlib import Path  # typer reads annotations while the program runs
from typing import Annotated

import typer

from moe_routing.cli._render_doctor import render
from moe_routing.cli._show import (
    Unusable,
    UsageError,
    check_writable,
    console,
    print_json,
    progress,
)


def report(
    *,
    out: Annotated[Path, typer.Option(metavar="FILE.html", help="Where to write the page.")] = Path(
        "moe-routing-report.html"
    ),
    device: Annotated[
        str | None,
        typer.Option(
            help="The device to try: cpu, cuda:0, ...; the first accelerator, else the CPU."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, for programs, instead of writing the page.")
    ] = False,
) -> None:
    """Write a page: doctor's findings, conformance and a short benchmark of route and plan.

    Takes some minutes.
    """
    from moe_routing.report import gather, to_html

    if not as_json:
        if out.suffix != ".html":
            msg = f"--out: expected a name that ends in .html, got {str(out)!r}"
            raise UsageError(msg)
        check_writable("--out", out)
    with progress() as bar:
        task = bar.add_task("report", total=None)
        gathered = gather(
            device,
            lambda what, done, total: bar.update(
                task, description=what, completed=done, total=total
            ),
        )
    if as_json:
        print_json(gathered.to_dict())
    else:
        try:
            out.write_text(to_html(gathered), encoding="utf-8")
        except OSError as error:
            render(gathered.doctor, console())
            msg = f"--out: {error}"
            raise Unusable(msg) from error
        console().print(f"Report: {out}", soft_wrap=True)
    raise typer.Exit(0 if gathered.ok else 1)
