"""``moe-routing doctor``."""

from __future__ import annotations

from typing import Annotated

import typer

from moe_routing.cli._catalogue import look_up
from moe_routing.cli._render_doctor import render
from moe_routing.cli._show import console, print_json
from moe_routing_registry import UnknownNameError


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
    """Examine devices, toolchains, backends and plug-ins; say what to fix, and how."""
    from moe_routing.doctor import CHECKS, examine

    for name in check or ():
        if name not in CHECKS:
            kind = "check"
            raise UnknownNameError(kind, name, CHECKS)
    if router is not None:
        look_up(router)
    report = examine(device=device, router=router, verify=verify, checks=check)
    if as_json:
        print_json(report)
    else:
        render(report, console(), verbose=verbose, tables=not check)
    raise typer.Exit(0 if report["ok"] else 1)
