"""``moe-routing tune``."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.text import Text

from moe_routing.cli._bench import main_device
from moe_routing.cli._catalogue import look_up
from moe_routing.cli._operations import sized
from moe_routing.cli._options import Block, Dtypes, Experts, Topk  # noqa: TC001 -- typer reads annotations while the program runs
from moe_routing.cli._show import (
    STATUS_STYLES,
    Unusable,
    UsageError,
    console,
    count,
    print_json,
    progress,
    shortened,
    table,
    words,
)
from moe_routing_registry import ResolutionReport, RoutingProblem, UnknownNameError
from moe_routing_registry.containment import PluginFailure, contained

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console

    from moe_routing_registry import Problem

SCHEMA_VERSION = 1


class Asked(NamedTuple):
    """A problem to tune.

    :ivar title: names it in a few words.
    :ivar said: the same as plain JSON values.
    :ivar report: which backend computes it here.
    """

    title: str
    said: dict[str, Any]
    report: ResolutionReport


def tune(  # noqa: PLR0913 -- the options of the command
    operation: Annotated[
        str, typer.Argument(metavar="[OPERATION]", help="The operation: route, or plan.")
    ] = "route",
    *,
    router: Annotated[
        list[str] | None,
        typer.Option("--router", "--model", metavar="NAME,...", help="Models or families; gemma4."),
    ] = None,
    experts: Experts = None,
    topk: Topk = None,
    dtype: Dtypes = None,
    block: Block = None,
    tokens: Annotated[
        list[str] | None,
        typer.Option(metavar="T,...", help="Numbers of tokens; a quarter apart, 1 to 250000."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda:0, ...; the first accelerator.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Measure which launch serves how many tokens best on this device, and keep it.

    Exit code 1 if one computed wrong.
    """
    found: list[dict[str, Any]] = []
    place = None
    try:
        place = device or main_device()
        sizes = [_tokens(word) for word in words(tokens)]
        if operation == "route":
            asked = _routers(place, words(router), words(dtype), experts, topk, block)
        else:
            given = {"num_experts": experts, "topk": topk, "block": block, "dtype": dtype}
            asked = [_problem(operation, place, router=router, **given)]
        place = str(asked[0].report.device)
        _measure(asked, sizes, found)
    except Exception as error:
        if as_json:
            said = shortened(error) if isinstance(error, UnknownNameError) else str(error)
            print_json(
                {
                    "schema_version": SCHEMA_VERSION,
                    "device": place,
                    "problems": found,
                    "error": said,
                }
            )
        raise
    if as_json:
        print_json(
            {"schema_version": SCHEMA_VERSION, "device": place, "problems": found, "error": ""}
        )
    else:
        screen = console()
        for one in found:
            _show(one, screen)
    raise typer.Exit(1 if any(one["wrong"] or one.get("not_kept") for one in found) else 0)


def _dtype(word: str) -> str:
    from moe_routing.bench import DTYPES

    if word in DTYPES or word in DTYPES.values():
        return DTYPES.get(word, word)
    msg = f"--dtype: expected one of {', '.join(DTYPES)}, got {word!r}"
    raise UsageError(msg)


def _tokens(word: str) -> int:
    try:
        return count(word)
    except typer.BadParameter as error:
        msg = f"--tokens: {error}"
        raise UsageError(msg) from error


def _routers(  # noqa: PLR0913, PLR0917 -- the options of the command
    device: str,
    routers: Sequence[str],
    dtypes: Sequence[str],
    experts: int | None,
    topk: int | None,
    block: int | None,
) -> list[Asked]:
    """Return a problem of ``route`` for each name and dtype."""
    if block is not None:
        msg = "--block: the operation 'route' has none"
        raise UsageError(msg)
    asked = []
    kinds = [_dtype(word) for word in dtypes] or ["bfloat16"]
    for name, dtype in product(routers or ("gemma4",), kinds):
        entry = look_up(name)
        options = {
            "num_experts": experts or entry.num_experts,
            "topk": topk or entry.topk,
            "dtype": dtype,
        }
        report = _tunable(name, device, **options)
        problem = report.problem
        assert isinstance(problem, RoutingProblem)  # noqa: S101 -- for mypy: `_tunable` saw to it
        sizes = {name: getattr(problem, name) for name in options}
        title = f"{name} {problem.num_experts}/{problem.topk} {problem.dtype}"
        asked.append(Asked(title, {"operation": "route", "router": name, **sizes}, report))
    return asked


def _problem(operation: str, device: str, **sizes: object) -> Asked:
    """Return the problem of another operation."""
    from moe_routing._registry import registry

    registry().operation(operation)
    problem = sized(operation, **sizes)
    return Asked(str(problem), problem.to_dict(), _tunable(problem, device))


def _tunable(asked: str | Problem, device: str, **options: Any) -> ResolutionReport:  # noqa: ANN401 -- those of `explain`
    """Ask which backend computes this; it must be one that can be tuned."""
    import moe_routing
    from moe_routing._registry import registry

    moe_routing.probe(device)  # a device that is not here is an error of its own
    report = moe_routing.explain(asked, device=device, **options)
    if report.problem is None:
        raise UsageError(report.error.partition(": ")[2] or report.error)
    if (
        report.winner is None
        or report.problem.operation not in registry().backends[report.winner].tuners
    ):
        raise Unusable(_refusal(report))
    return report


def _refusal(report: ResolutionReport) -> str:
    """Say why nothing can be tuned here, and the command to try."""
    from moe_routing._registry import registry

    tunable = [
        backend.name
        for backend in registry().backends.values()
        if report.problem and report.problem.operation in backend.tuners
    ]
    operation = report.problem.operation if report.problem else "it"
    computes = (
        f"{report.winner} computes {operation}, and has nothing to tune"
        if report.winner
        else f"no backend computes {operation}"
    )
    missed = [rejection for name in tunable if (rejection := report.rejection(name)) is not None]
    reasons = "; ".join(f"{rejection.name} {rejection.verdict.reason}" for rejection in missed)
    fixes = [rejection.verdict.fix for rejection in missed if rejection.verdict.fix] or [
        "moe-routing doctor"
    ]
    return (
        f"nothing to tune on {report.device}: {computes}; "
        f"{reasons or 'no backend can be tuned'}; try: {fixes[0]}"
    )


def _measure(asked: Sequence[Asked], sizes: Sequence[int], found: list[dict[str, Any]]) -> None:
    """Tune one problem after another; what was measured before one fails stays in ``found``."""
    from moe_routing._registry import registry

    with progress() as bar:
        for name, said, report in asked:
            problem, winner = report.problem, report.winner
            assert problem is not None and winner is not None  # noqa: S101, PT018 -- for mypy: `_tunable` saw to it
            task = bar.add_task(name, total=None)

            def advance(
                what: str,
                done: int,
                total: int,
                *,
                task: Any = task,  # noqa: ANN401 -- rich's id
                name: str = name,
            ) -> None:
                # What comes first is what all of it takes.
                if bar.tasks[task].total is None and not bar.disable:
                    bar.console.print(f"{name}: {what}")
                bar.update(task, description=f"{name}, {what}", completed=done, total=total)

            try:
                with contained("its tuner"):
                    measure: Callable[..., Any] = registry().tuner(winner, problem.operation)
                    tuned = measure(
                        problem,
                        report.device,
                        **({"tokens": sizes} if sizes else {}),
                        on_step=advance,
                    )
                    measured = tuned.to_dict()
            except PluginFailure as failure:
                msg = f"{name} on {report.device}: {winner}: {failure.sentence}"
                raise Unusable(msg) from failure
            found.append({**said, "title": name, "backend": winner, **measured})


def _show(one: dict[str, Any], screen: Console) -> None:
    rows = [
        (
            Text(f"{timed['tokens']:,}", justify="right"),
            _launch(timed["launch"]),
            Text(f"{timed['us']:.2f}", justify="right"),
            _launch(timed["launch_before"]),
            Text(f"{timed['us_before']:.2f}", justify="right"),
        )
        for timed in one["timed"]
    ]
    title = f"{one['title']}, microseconds in a CUDA graph"
    columns = ("T", "fastest", "us", "before", "us before")
    screen.print(table(title, *columns, rows=rows, whole=("T", "us", "us before")))
    for kind, status in (("wrong", "problem"), ("unusable", "skipped")):
        for sentence in one[kind]:
            screen.print(Text.assemble((f"{kind}: ", STATUS_STYLES[status]), sentence))
    screen.print(Text(f"before: {one['before']}"), soft_wrap=True)
    not_kept = one.get("not_kept")
    screen.print(f"not kept: {not_kept}" if not_kept else f"kept in {one['table']}", soft_wrap=True)


def _launch(launch: dict[str, Any]) -> str:
    """Show a launch, of which each backend has fields of its own."""
    return ", ".join(
        value if isinstance(value, str) else f"{name}={value}" for name, value in launch.items()
    )
