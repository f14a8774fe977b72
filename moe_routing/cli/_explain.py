"""``moe-routing explain``."""

from __future__ import annotations

from contextlib import suppress
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer
from rich.padding import Padding
from rich.text import Text

from moe_routing.cli._catalogue import look_up
from moe_routing.cli._operations import sized
from moe_routing.cli._options import Experts, Topk  # noqa: TC001 -- typer reads annotations while the program runs
from moe_routing.cli._show import (
    STATE_STYLES,
    Unusable,
    UsageError,
    command,
    console,
    mark,
    print_json,
    table,
)
from moe_routing.probing import AbsentDeviceError, UnknownDeviceError
from moe_routing_registry import Request, RoutingProblem

if TYPE_CHECKING:
    from typing import Any

    from rich.console import Console

    from moe_routing_registry import Problem, ResolutionReport

SCHEMA_VERSION = 1


class Dtype(str, Enum):
    """Dtypes of logits; an enumeration because older versions of typer take no ``Literal``."""

    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"
    FLOAT64 = "float64"


def explain(  # noqa: PLR0913 -- the options of the command
    router: Annotated[
        str,
        typer.Argument(
            metavar="ROUTER",
            help="A model or family, as `moe-routing list` shows them, or an operation: plan.",
        ),
    ],
    *,
    device: Annotated[str, typer.Option(help="The device: cpu, cuda:0, xpu, mps, ...")] = "cpu",
    num_experts: Experts = None,
    topk: Topk = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Dtype of the logits; bfloat16.", show_default=False)
    ] = None,
    backend: Annotated[str | None, typer.Option(help="This backend or none.")] = None,
    replay: Annotated[bool, typer.Option("--replay", help="For calls with recorded ids.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Show which backend would be used, who asked for it, and why the others would not."""
    from moe_routing._registry import registry

    if backend is not None:
        registry().check_names(Request(backend=backend, asked_by="argument"))
    operation = registry().operations.get(router)
    if operation is not None and router != "route":
        if replay:
            msg = f"--replay: expected a model or family, got the operation {router!r}"
            raise UsageError(msg)
        asked = sized(
            router, num_experts=num_experts, topk=topk, dtype=None if dtype is None else dtype.value
        )
        said, report = {"operation": router}, _ask(asked, device=device, backend=backend)
        does = operation.summary
    else:
        entry = look_up(router)
        does = entry.spec.formula
        said = {"router": router, "formula": does}
        report = _ask(
            entry.name,
            device=device,
            num_experts=num_experts or entry.num_experts,
            topk=topk or entry.topk,
            dtype=(dtype or Dtype.BFLOAT16).value,
            backend=backend,
            operands=("ids",) if replay else (),
        )
    if as_json:
        print_json({"schema_version": SCHEMA_VERSION, **said, **report.to_dict()})
    else:
        _show(console(), router, does, device, report)
    raise typer.Exit(0 if report.winner else 1)


def _ask(asked: str | Problem, *, device: str, **options: Any) -> ResolutionReport:  # noqa: ANN401 -- those of `explain`
    import moe_routing

    try:
        with suppress(AbsentDeviceError):  # which the report says
            moe_routing.probe(device)
    except UnknownDeviceError:
        raise
    except Exception as error:  # a broken torch raises anything at import
        msg = (
            f"torch cannot be used ({type(error).__name__}: {error}); "
            "`moe-routing doctor` says more"
        )
        raise Unusable(msg) from error
    report = moe_routing.explain(asked, device=device, **options)
    if report.problem is None:
        kind, _, sentence = report.error.partition(": ")
        if kind == "ValueError":  # E, K and the family do not go together
            raise UsageError(sentence)
        raise Unusable(report.error)
    return report


def _show(screen: Console, name: str, does: str, device: str, report: ResolutionReport) -> None:
    place = str(report.device or device)
    screen.print(Text.assemble((name, "bold"), f" on {place}"))
    screen.print(Padding(Text(does, style="cyan"), (0, 0, 0, 4), expand=False))
    problem = report.problem
    if isinstance(problem, RoutingProblem):
        screen.print(f"    E={problem.num_experts} K={problem.topk} {problem.dtype}")
    elif problem is not None:
        screen.print(Padding(Text(str(problem)), (0, 0, 0, 4), expand=False))
    status = ("warning" if report.missed else "ok") if report.winner else "problem"
    answer = f"{report.winner}: {report.why}" if report.winner else f"no backend: {report.why}"
    screen.print(mark(screen, status) + Text(answer))
    for note in report.notes:
        screen.print(Padding(Text(note), (0, 0, 0, 4), expand=False))
    rows = [
        (name, Text(state, style=STATE_STYLES[state]), code, reason)
        for name, state, code, reason in (
            *(
                (c.name, "selected", "", report.why)
                for c in report.eligible
                if c.name == report.winner
            ),
            *((c.name, "available", "", "") for c in report.eligible if c.name != report.winner),
            *(
                (
                    r.name,
                    "rejected",
                    r.verdict.code.value if r.verdict.code else "",
                    r.verdict.reason,
                )
                for r in report.considered
            ),
        )
    ]
    if rows:
        screen.print(
            table(None, "Name", "State", "Code", "Why", rows=rows, whole=("Name", "State", "Code"))
        )
    for rejection in report.considered:
        if rejection.verdict.fix:
            screen.print(Text(f"to use {rejection.name}:"))
            command(screen, rejection.verdict.fix)
