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
    from collections.abc import Callable

    from rich.console import Console

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.runner import NotUsableError, Report, Result

    Advance = Callable[[Result, int, int], None]
    """What is called after each check: its result, how many are done, and how many there are."""

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
        str | None, typer.Argument(help="Name of the backend, as `moe-routing doctor` lists it.")
    ] = None,
    *,
    device: Annotated[
        str | None,
        typer.Option(
            help="The device to check it on: cpu, cuda:0, xpu, ... Without it cpu; with "
            "--distributed each rank's accelerator, if there is one."
        ),
    ] = None,
    operation: Annotated[
        str | None,
        typer.Option(
            help="The operation whose contract is checked: route, or with --distributed exchange."
        ),
    ] = None,
    distributed: Annotated[
        bool,
        typer.Option(
            "--distributed",
            help="Check transports on all ranks that torchrun started: every one of them, "
            "unless BACKEND names one.",
        ),
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help="All sizes and dtypes, not a pairwise sample of them.")
    ] = False,
    clause: Annotated[
        list[int] | None,
        typer.Option(
            help="Only this clause of the contract, such as 0 to 19 of route; repeatable."
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

    operation = operation or ("exchange" if distributed else "route")
    _check_who(backend, operation, report, distributed=distributed)
    clauses = contract_of(operation).clauses

    for number in clause or ():
        if number not in clauses:
            msg = f"--clause: expected one of {', '.join(map(str, clauses))}, got {number}"
            raise UsageError(msg)
    for path in report or ():
        _check_path(path)
    profile: Profile = "full" if full else "quick"
    if distributed:
        outcomes = _on_every_rank(backend, device, profile, clause, seed, as_json=as_json)
    else:
        assert backend is not None  # noqa: S101 -- for mypy: _check_who asked
        where = device or "cpu"
        outcomes = [_run(backend, where, operation, profile, clause, seed, as_json=as_json)]
    if outcomes is None:  # another rank than the first, which shows them
        return
    if not outcomes:  # it has been said why
        raise typer.Exit(NOTHING_CHECKED)
    if as_json:
        made = [outcome.to_dict() for outcome in outcomes]
        ok = all(outcome.ok for outcome in outcomes)
        print_json(made[0] if backend else {"ok": ok, "reports": made})
    else:
        for outcome in outcomes:
            _show(outcome, console())
    for path in report or ():
        _write(outcomes[0], path, as_json=as_json)
    raise typer.Exit(_exit_code(outcomes))


def _exit_code(outcomes: list[Report]) -> int:
    if any(outcome.failed for outcome in outcomes):
        return 1
    return 0 if all(outcome.ok for outcome in outcomes) else NOTHING_CHECKED


def _say_unusable(backend: str, device: str, error: NotUsableError, *, as_json: bool) -> None:
    if not as_json:
        console().print(str(error), soft_wrap=True)
        return
    verdict = {"verdict": str(error), "counts": _NOTHING}
    print_json({"ok": False, "backend": backend, "device": device, **verdict})


def _check_who(
    backend: str | None, operation: str, report: list[Path] | None, *, distributed: bool
) -> None:
    """Require a backend, or ranks for all of them."""
    if not distributed:
        if backend is None:
            msg = "BACKEND: expected a name that `moe-routing doctor` lists, got none"
            raise UsageError(msg)
        return
    from torch.distributed import is_torchelastic_launched

    from moe_routing.conformance.exchange.ranks import COMMAND

    if operation != "exchange":
        msg = f"--operation: expected exchange with --distributed, got {operation!r}"
        raise UsageError(msg)
    if not is_torchelastic_launched():
        command = COMMAND.format(ranks=2)
        msg = f"--distributed: expected a process of torchrun, got none; {command}"
        raise UsageError(msg)
    if report and backend is None:
        msg = "--report: expected the argument BACKEND too, got none; a report is of one"
        raise UsageError(msg)


def _on_every_rank(  # noqa: PLR0913 -- the options of the command
    backend: str | None,
    device: str | None,
    profile: Profile,
    clauses: list[int] | None,
    seed: int | None,
    *,
    as_json: bool,
) -> list[Report] | None:
    """Check transports together with the other ranks; only the first one returns reports."""
    from moe_routing.conformance.exchange import ranks
    from moe_routing.conformance.runner import NotUsableError

    reports = []
    with ranks.of_torchrun(device, seed) as here:
        for name in [backend] if backend else ranks.transports():

            def run(advance: Advance | None = None, name: str = name) -> Report:
                return ranks.run(here, name, profile, clauses, advance)

            try:
                reports.append(run() if here.rank else _with_progress(name, run))
            except NotUsableError as error:
                if here.rank == 0 and as_json and backend is None:
                    typer.echo(str(error), err=True)  # one of several, whose JSON follows
                elif here.rank == 0:
                    _say_unusable(name, str(here.device), error, as_json=as_json)
        return None if here.rank else reports


def _check_path(path: Path) -> None:
    from moe_routing.conformance.report import WRITERS

    if path.suffix not in WRITERS:
        msg = f"--report: expected a name that ends in {', '.join(WRITERS)}, got {str(path)!r}"
        raise UsageError(msg)
    check_writable("--report", path)


def _write(outcome: Report, path: Path, *, as_json: bool) -> None:
    from moe_routing.conformance.report import write

    try:
        write(outcome, path)
    except OSError as error:
        msg = f"--report: {error}"
        raise Unusable(msg) from error
    if not as_json:
        console().print(f"Report: {path}", soft_wrap=True)


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
    from moe_routing.conformance.runner import NotUsableError, run

    moe_routing.probe(device)  # a device that is not here is an error of its own
    try:
        return _with_progress(
            backend,
            lambda advance: run(
                backend,
                device,
                operation=operation,
                profile=profile,
                clauses=clauses,
                seed=seed,
                on_result=advance,
            ),
        )
    except NotUsableError as error:
        _say_unusable(backend, device, error, as_json=as_json)
        raise typer.Exit(NOTHING_CHECKED) from error


def _with_progress(backend: str, run: Callable[[Advance], Report]) -> Report:
    """Run with a bar, which ``run`` moves by what it is given."""
    with progress() as bar:
        task = bar.add_task(backend, total=None)

        def advance(result: Result, done: int, total: int) -> None:
            bar.update(
                task,
                description=f"{result.clause:2d} {result.check:<48}",
                completed=done,
                total=total,
            )
            if result.status == "failed" and not bar.disable:
                bar.console.print(Text.assemble(("failed ", _STYLES["failed"]), result.id))

        return run(advance)


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
