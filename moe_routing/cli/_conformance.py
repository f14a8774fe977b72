"""``moe-routing conformance``."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from moe_routing.cli._show import STATUS_STYLES, UsageError, console, print_json, table

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from rich.console import Console

    from moe_routing.testing.cases import Profile
    from moe_routing.testing.kit import Report, Result

_SHOWN = 10
_STYLES = {
    "passed": STATUS_STYLES["ok"],
    "failed": STATUS_STYLES["problem"],
    "gap": STATUS_STYLES["warning"],
    "declined": STATUS_STYLES["skipped"],
    "not_applicable": STATUS_STYLES["skipped"],
}


def conformance(  # noqa: PLR0913 -- the options of the command
    backend: Annotated[str, typer.Argument(help="Name of the backend, as `moe-routing doctor` lists it.")],
    *,
    device: Annotated[str, typer.Option(help="The device to check it on: cpu, cuda:0, xpu, ...")] = "cpu",
    full: Annotated[bool, typer.Option("--full", help="All sizes and dtypes, not a thinned list of them.")] = False,
    point: Annotated[list[int] | None, typer.Option(help="Only this point of the contract, 0 to 15; may be repeated.")] = None,
    report: Annotated[
        list[str] | None, typer.Option(help="Write a report: NAME.html, NAME.json or NAME.xml (JUnit); may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON report, for programs.")] = False,
) -> None:
    """Check a backend against the whole contract; exit code 0 if it conforms, 1 if not."""
    from moe_routing.testing.points import POINTS
    from moe_routing.testing.reports import WRITERS, write

    for number in point or ():
        if number not in POINTS:
            msg = f"--point: expected a number from 0 to {max(POINTS)}, got {number}"
            raise UsageError(msg)
    for path in report or ():
        if not path.endswith(tuple(WRITERS)):
            msg = f"--report: expected a name that ends in {', '.join(WRITERS)}, got {path!r}"
            raise UsageError(msg)
    screen = console()
    outcome = _run(backend, device, "full" if full else "quick", point, None if as_json else screen)
    for path in report or ():
        write(outcome, path)
    if as_json:
        print_json(outcome.to_dict())
    else:
        _show(outcome, screen)
        for path in report or ():
            screen.print(f"Report: {path}", markup=False)
    raise typer.Exit(0 if outcome.ok else 1)


def _run(backend: str, device: str, profile: Profile, points: list[int] | None, screen: Console | None) -> Report:
    from moe_routing.testing.kit import run

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=screen, transient=True, disable=screen is None or not screen.is_terminal)
    task = progress.add_task("conformance", total=None)

    def advance(result: Result, done: int, total: int) -> None:
        progress.update(task, description=f"{result.point:2d} {result.check:<48}", completed=done, total=total)
        if result.status == "failed" and screen is not None and screen.is_terminal:
            progress.console.print(Text.assemble(("failed ", _STYLES["failed"]), result.id))

    live: AbstractContextManager[object] = nullcontext() if screen is None else progress
    with live:
        return run(backend, device, profile=profile, points=points, on_result=advance)


def _show(report: Report, screen: Console) -> None:
    from moe_routing.testing.points import POINTS
    from moe_routing.testing.reports import STATUSES

    shown = [status for status in STATUSES if report.count(status)]
    rows: list[tuple[str | Text, ...]] = [
        (
            str(number),
            POINTS[number].rule,
            *(Text(str(report.count(s, point=number) or ""), style=_STYLES[s], justify="right") for s in shown),
        )
        for number in sorted({result.point for result in report.results})
    ]
    headings = [status.replace("_", " ") for status in shown]
    title = f"{report.backend} ({report.distribution}) on {report.device}"
    screen.print(table(title, "point", "rule", *headings, rows=rows, whole=("point", *headings)))
    for result in report.failed[:_SHOWN]:
        screen.print(Text.assemble(("failed ", _STYLES["failed"]), result.id))
        screen.print(Text(f"    {result.message.partition(chr(10))[0]}"), soft_wrap=True)
    if len(report.failed) > _SHOWN:
        screen.print(f"and {len(report.failed) - _SHOWN} more; --report failures.html lists them all", markup=False)
    for capability, reason in report.gaps.items():
        screen.print(Text(f"gap: {capability}: {reason}", style=_STYLES["gap"]))
    verdict = "conforms" if report.ok else "does not conform"
    screen.print(Text(f"{report.backend} {verdict}: {len(report.results)} checks in {report.seconds:.1f} s", style="bold"))
