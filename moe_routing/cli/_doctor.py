"""``moe-routing doctor``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from moe_routing.cli._catalogue import look_up
from moe_routing.cli._render_doctor import render
from moe_routing.cli._show import console, print_json, stdout
from moe_routing_registry import UnknownNameError
from moe_routing_registry.text import printable


def doctor(  # noqa: PLR0913 -- the options of the command
    *,
    device: Annotated[
        str | None, typer.Option(help="Only this device, which must be here: cpu, cuda:0, xpu, ...")
    ] = None,
    router: Annotated[
        str | None, typer.Option(help="Judge backends by this model or family, instead of gemma4.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare every available backend with the oracle.")
    ] = False,
    check: Annotated[
        list[str] | None, typer.Option(help="Run only this check; may be repeated.")
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Also tracebacks, and checks that do not apply.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Examine devices, toolchains, backends and plug-ins; say what to fix, and how.

    Started by torchrun, every rank examines itself, and rank 0 shows what all found.
    """
    from moe_routing.doctor import (
        CHECKS,
        SECONDS,
        SECONDS_VERIFYING,
        examine,
        examined_by_ranks,
        launched,
    )

    def examination(place: str | None) -> dict[str, Any]:
        for name in check or ():
            if name not in CHECKS:
                kind = "check"
                raise UnknownNameError(kind, name, CHECKS)
        if router is not None:
            look_up(router)
        return examine(device=place, router=router, verify=verify, checks=check)

    def show(report: dict[str, Any]) -> None:
        if as_json:
            print_json(report)
        else:
            render(report, console(), verbose=verbose, tables=not check)
        stdout().flush()

    if not launched():
        report = examination(device)
        show(report)
        raise typer.Exit(0 if report["ok"] else 1)
    wait = SECONDS_VERIFYING if verify else SECONDS
    with examined_by_ranks(examination, device=device, seconds=wait, say=_say) as examined:
        if examined.rank == 0:
            show(examined.report)
        elif examined.unmet:
            _say(f"rank {examined.rank}: {examined.unmet}")
    raise typer.Exit(0 if examined.ok else 1)


def _say(text: str) -> None:
    """Say what is no part of the answer."""
    typer.echo(f"moe-routing: {printable(text)}", err=True)
