"""``moe-routing conformance``."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 -- typer reads annotations while the program runs
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from moe_routing.cli._show import (
    STATUS_STYLES,
    Unusable,
    UsageError,
    check_writable,
    console,
    print_json,
    progress,
    table,
)

if TYPE_CHECKING:
    from rich.console import Console

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.runner import Report, Result

_SHOWN = 10
NOTHING_CHECKED = 2
"""Exit code if the backend cannot be used on the device, or if nothing could be checked."""
_NOTHING = {"checked": 0, "declined": 0, "not_run": 0}
_STYLES = {
    "passed": STATUS_STYLES["ok"],
    "failed": STATUS_STYLES["problem"],
    "gap": STATUS_STYLES["warning"],
    "declined": STATUS_STYLES["skipped"],
    "not_run": STATUS_STYLES["skipped"],
    "not_applicable": STATUS_STYLES["skipped"],
}


def conformance(  # noqa: PLR0913 -- the options of the command
    backend: Annotated[
        str, typer.Argument(help="Name of the backend, as `moe-routing doctor` lists it.")
    ],
    *,
    device: Annotated[
        str, typer.Option(help="The device to check it on: cpu, cuda:0, xpu, ...")
    ] = "cpu",
    operation: Annotated[
        str, typer.Option(help="The operation whose contract is checked.")
    ] = "route",
    full: Annotated[
        bool, typer.Option("--full", help="All sizes and dtypes, not a pairwise sample of them.")
    ] = False,
    clause: Annotated[
        list[int] | None,
        typer.Option(
            help="Only this clause of the contract, such as 0 to 18 of route; repeatable."
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Draw the cases that are in no list from this seed, not from a new one."),
    ] = None,
    report: Annotated[
        list[Path] | None,
        typer.Option(
            help="Write a report: NAME.html, NAME.json or NAME.xml (JUnit); may be repeated."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the JSON report, for programs.")
    ] = False,
) -> None:
    """Check a backend against the whole contract.

    Exit code 0 if it conforms, 1 if not, 2 if nothing was checked.
    """
    from moe_routing.conformance.contract import contract_of
    from moe_routing.conformance.report import WRITERS, write

    clauses = contract_of(operation).clauses

    for number in clause or ():
        if number not in clauses:
            msg = f"--clause: expected one of {', '.join(map(str, clauses))}, got {number}"
            raise UsageError(msg)
    for path in report or ():
        if path.suffix not in WRITERS:
            msg = f"--report: expected a name that ends in {', '.join(WRITERS)}, got {str(path)!r}"
            raise UsageError(msg)
        check_writable("--report", path)
    outcome = _run(
        backend, device, operation, "full" if full else "quick", clause, seed, as_json=as_json
    )
    screen = console()
    if as_json:
        print_json(outcome.to_dict())
    else:
        _show(outcome, screen)
    for path in report or ():
        try:
            write(outcome, path)
        except OSError as error:
            msg = f"--report: {error}"
            raise Unusable(msg) from error
        if not as_json:
            screen.print(f"Report: {path}", soft_wrap=True)
    raise typer.Exit(0 if outcome.ok else 1 if outcome.failed else NOTHING_CHECKED)


def _run(  # noqa: PLR0913, PLR0917 -- the options of the command
    backend: str,
    device: str,
    operation: str,
    profile: Profile,
    clauses: list[int] | None,
    seed: int | None,
    *,
    as_json: bool,
) -> Report:
    import moe_routing
    from moe_routing.conformance.runner import NotUsableError

    moe_routing.probe(device)  # a device that is not here is an error of its own
    try:
        return _with_progress(backend, device, operation, profile, clauses, seed)
    except NotUsableError as error:
        if as_json:
            print_json(
                {
                    "ok": False,
                    "backend": backend,
                    "device": device,
                    "verdict": str(error),
                    "counts": _NOTHING,
                }
            )
        else:
            console().print(str(error), soft_wrap=True)
        raise typer.Exit(NOTHING_CHECKED) from error


def _with_progress(  # noqa: PLR0913, PLR0917 -- the options of the command
    backend: str,
    device: str,
    operation: str,
    profile: Profile,
    clauses: list[int] | None,
    seed: int | None,
) -> Report:
    from moe_routing.conformance.runner import run

    with progress() as bar:
        task = bar.add_task("conformance", total=None)

        def advance(result: Result, done: int, total: int) -> None:
            bar.update(
                task,
                description=f"{result.clause:2d} {result.check:<48}",
                completed=done,
                total=total,
            )
            if result.status == "failed" and not bar.disable:
                bar.console.print(Text.assemble(("failed ", _STYLES["failed"]), result.id))

        return run(
            backend,
            device,
            operation=operation,
            profile=profile,
            clauses=clauses,
            seed=seed,
            on_result=advance,
        )


def _show(report: Report, screen: Console) -> None:
    from moe_routing.conformance.report import STATUSES

    shown = [status for status in STATUSES if report.count(status)]
    rows: list[tuple[str | Text, ...]] = [
        (
            str(number),
            report.clauses[number].rule,
            *(
                Text(str(report.count(s, clause=number) or ""), style=_STYLES[s], justify="right")
                for s in shown
            ),
        )
        for number in sorted({result.clause for result in report.results})
    ]
    headings = [status.replace("_", " ") for status in shown]
    title = f"{report.backend} ({report.distribution}) on {report.device}"
    screen.print(table(title, "clause", "rule", *headings, rows=rows, whole=("clause", *headings)))
    for result in report.failed[:_SHOWN]:
        screen.print(Text.assemble(("failed ", _STYLES["failed"]), result.id))
        screen.print(f"    {result.message.partition(chr(10))[0]}", soft_wrap=True)
    if len(report.failed) > _SHOWN:
        screen.print(
            f"and {len(report.failed) - _SHOWN} more; --report failures.html lists them all"
        )
    for capability, reason in report.gaps.items():
        screen.print(Text(f"gap: {capability}: {reason}", style=_STYLES["gap"]))
    screen.print(Text(f"{report.backend} {report.verdict}", style="bold"), soft_wrap=True)
    screen.print(f"{len(report.results)} cases in {report.seconds:.1f} s, seed {report.seed}")
