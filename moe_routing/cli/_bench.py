"""``moe-routing bench``."""

from __future__ import annotations

import importlib.util
from pathlib import Path  # noqa: TC003 -- typer reads annotations while the program runs
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer
from rich.text import Text

from moe_routing.cli._catalogue import look_up
from moe_routing.cli._operations import by_option, sized
from moe_routing.cli._options import Block, Dtypes, Experts, Topk  # noqa: TC001 -- typer reads annotations while the program runs
from moe_routing.cli._show import (
    STATUS_STYLES,
    Unusable,
    UsageError,
    check_writable,
    console,
    count,
    print_json,
    progress,
    stdout,
    table,
    words,
)
from moe_routing.probing import AbsentDeviceError, UnknownDeviceError
from moe_routing_registry import UnknownNameError
from moe_routing_registry.text import printable, refusal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from moe_routing.bench import AnyCase, AnySettings, Loss, PlanSettings, Result, Settings

PLOTS = (".png", ".html")
INSTALL = "pip install 'moe-routing[bench]'"


def bench(  # noqa: PLR0913 -- the options of the command
    operation: Annotated[
        str | None,
        typer.Argument(
            metavar="[OPERATION]", help="The operation: route, or plan; a kept run's, else route."
        ),
    ] = None,
    *,
    router: Annotated[
        list[str] | None, typer.Option(metavar="NAME,...", help="Models or families; gemma4.")
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,...|all",
            help="Backends, or all that fit; the one that the device gets, of plan all.",
        ),
    ] = None,
    tokens: Annotated[
        list[str] | None,
        typer.Option(metavar="T,...", help="Numbers of tokens; 1,16,256,4096,65536."),
    ] = None,
    experts: Experts = None,
    topk: Topk = None,
    block: Block = None,
    dtype: Dtypes = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda:0, xpu, ...; the first accelerator, else the CPU.")
    ] = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODE,...",
            help="graph: the kernels, in CUDA graphs; call: whole calls; "
            "host: what a call takes of the CPU. graph where there are graphs, else call; "
            "of plan call.",
        ),
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,...|none",
            help="What to compare with: baseline (a Triton kernel that sorts rows), "
            "eager (the formula in plain PyTorch), "
            "compile-default, compile-reduce-overhead, compile-max-autotune; eager. "
            "Of plan: sort (stable sort, bincount, scatter), sort-int32; both.",
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN.json",
            help="Measure a kept run's backends again; exit code 1 if one lost beyond noise.",
        ),
    ] = None,
    plot: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Draw it: NAME.png or NAME.html; may be repeated."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, for programs and for --against.")
    ] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
) -> None:
    """Benchmark routing, or another operation, on this machine against alternatives.

    An incorrect one gets no time, and exit code 1.
    """
    if as_json and as_csv:
        msg = "--csv: expected one of --json and --csv, got both"
        raise UsageError(msg)
    _check_plots(plot or ())
    before = None if against is None else _read(against)
    given = _Given(router, backend, tokens, experts, topk, block, dtype, device, mode, compare)
    settings = _settings_of(operation, given, before.settings if before else None)
    result, slower = _run(settings, before)
    if as_json:
        print_json(
            {**result.to_dict(), **({"losses": [str(loss) for loss in slower]} if before else {})}
        )
    elif as_csv:
        stdout().write(printable(result.to_csv()))
    else:
        screen = console()
        _show(result, screen)
        if before is not None:
            _show_losses(result, slower, screen)
    for path in plot or ():
        _draw(result, path)
    raise typer.Exit(1 if result.wrong or slower else 0)


class _Given(NamedTuple):
    """The options that say what to measure, as they came; ``None`` where nothing came."""

    router: list[str] | None
    backend: list[str] | None
    tokens: list[str] | None
    experts: int | None
    topk: int | None
    block: int | None
    dtype: list[str] | None
    device: str | None
    mode: list[str] | None
    compare: list[str] | None


def _check_plots(paths: Sequence[Path]) -> None:
    """Refuse what cannot be drawn before anything is measured."""
    for path in paths:
        if path.suffix not in PLOTS:
            msg = f"--plot: expected a name that ends in {' or '.join(PLOTS)}, got {str(path)!r}"
            raise UsageError(msg)
        if importlib.util.find_spec("matplotlib") is None:
            msg = f"--plot: matplotlib is not installed: {INSTALL}"
            raise Unusable(msg)
        check_writable("--plot", path)


def _read(path: Path) -> Result:
    from moe_routing.bench import Result

    try:
        return Result.read(path)
    except (OSError, ValueError) as error:
        msg = f"--against: {error}"
        raise UsageError(msg) from error


def _settings_of(operation: str | None, given: _Given, kept: AnySettings | None) -> AnySettings:
    """Put together what to measure.

    What was given, else what the kept run measured, else the defaults.
    """
    from moe_routing.bench import KINDS, PlanSettings, Settings

    operation = operation or (kept.operation if kept else "route")
    if operation not in KINDS:
        raise UsageError(refusal("operation", f"one of {', '.join(KINDS)}", operation))
    if kept is not None and kept.operation != operation:
        msg = f"--against: expected a run of {operation}, got one of {kept.operation}"
        raise UsageError(msg)
    if operation == "plan":
        return _plan_settings(given, kept if isinstance(kept, PlanSettings) else None)
    return _route_settings(given, kept if isinstance(kept, Settings) else None)


def _plan_settings(given: _Given, kept: PlanSettings | None) -> PlanSettings:
    from moe_routing.bench import PlanSettings

    sized(
        "plan",
        num_experts=given.experts,
        topk=given.topk,
        block=given.block,
        router=given.router,
        dtype=given.dtype,
    )  # refuses what it has none of
    base = kept or PlanSettings(device=given.device or main_device())
    try:
        return PlanSettings(
            num_experts=given.experts or base.num_experts,
            topk=given.topk or base.topk,
            block=given.block or base.block,
            backends=_words(given.backend) or base.backends,
            tokens=tuple(_tokens(word) for word in _words(given.tokens)) or base.tokens,
            device=given.device or base.device,
            modes=_words(given.mode) or base.modes,
            compare=_words(given.compare) if given.compare or kept else base.compare,
        )
    except ValueError as error:
        raise by_option(error) from error


def _route_settings(given: _Given, kept: Settings | None) -> Settings:
    from moe_routing.bench import DTYPES, Settings, best_mode

    if given.block is not None:
        msg = "--block: the operation 'route' has none"
        raise UsageError(msg)
    device = given.device or (kept.device if kept else main_device())
    base = kept or Settings(device=device, modes=(best_mode(device),))
    routers = _words(given.router) or base.routers
    resized = kept is None or given.router or given.experts or given.topk
    try:
        return Settings(
            routers=routers,
            sizes=tuple(_size(name, given) for name in routers) if resized else base.sizes,
            backends=_words(given.backend) or base.backends,
            tokens=tuple(_tokens(word) for word in _words(given.tokens)) or base.tokens,
            dtypes=tuple(DTYPES.get(name, name) for name in _words(given.dtype)) or base.dtypes,
            device=device,
            modes=_words(given.mode) or base.modes,
            # A kept run's comparisons are other people's code: nothing of ours gets slower there.
            compare=_words(given.compare) if given.compare or kept else base.compare,
        )
    except UnknownNameError:
        raise
    except ValueError as error:
        raise by_option(error) from error


def _words(given: list[str] | None) -> tuple[str, ...]:
    return tuple(word for word in words(given) if word != "none")


def _tokens(word: str) -> int:
    try:
        return count(word)
    except typer.BadParameter as error:
        msg = f"tokens: {error}"
        raise ValueError(msg) from error


def _size(name: str, given: _Given) -> tuple[int, int]:
    entry = look_up(name)
    experts = given.experts or entry.num_experts or 128
    topk = given.topk or entry.topk or min(8, experts)
    entry.spec.check_size(experts, topk)
    return experts, topk


def main_device() -> str:
    """Name the first accelerator, else the CPU."""
    return next((name for name in _device_names() if name != "cpu"), "cpu")


def _device_names() -> list[str]:
    from moe_routing.probing import device_names

    try:
        return device_names()
    except Exception as error:  # a broken torch raises anything at import
        msg = (
            f"torch cannot be used ({type(error).__name__}: {error}); "
            "`moe-routing doctor` says more"
        )
        raise Unusable(msg) from error


def _run(settings: AnySettings, before: Result | None) -> tuple[Result, list[Loss]]:
    """Measure with a progress bar.

    What seems to have got slower is measured once more before it is said.
    """
    from moe_routing.bench import losses, merged, refuse_another_run
    from moe_routing.bench.measuring import described, measure

    def timed(cases: Sequence[AnyCase]) -> Result:
        with progress() as bar:
            task = bar.add_task(f"bench {cases[0]}", total=len(cases))

            def advance(_result: Result, done: int, total: int) -> None:
                description = f"bench {cases[done]}" if done < total else "bench"
                bar.update(task, description=description, completed=done)

            return measure(settings, cases=cases, on_case=advance)

    try:
        if before is not None:
            refuse_another_run(before, described(settings.device), settings)
        result = timed(settings.cases)
        slower = [] if before is None else losses(before, result)
        if before is not None and slower:
            again = timed(list(dict.fromkeys(loss.row.case for loss in slower)))
            keys = {loss.row.key for loss in slower}
            result = merged(result, again, keys)
            slower = [loss for loss in losses(before, result) if loss.row.key in keys]
    except (AbsentDeviceError, UnknownDeviceError, UnknownNameError):
        raise
    except ValueError as error:
        raise by_option(error) from error
    return result, slower


def _draw(result: Result, path: Path) -> None:
    from moe_routing.bench.page import to_html
    from moe_routing.bench.plot import save_png

    try:
        if path.suffix == ".png":
            save_png(result, path)
        else:
            path.write_text(to_html(result), encoding="utf-8")
    except OSError as error:
        msg = f"--plot: {error}"
        raise Unusable(msg) from error


def _show(result: Result, screen: Console) -> None:
    """Print a table for each problem, dtype and mode, and what was not timed."""
    from moe_routing.bench.page import COLUMNS, about, cells, remarks
    from moe_routing.bench.plot import facets

    for facet, rows in facets(result).items():
        timed = [
            tuple(
                Text(cell, justify="left" if column == "implementation" else "right")
                for column, cell in zip(COLUMNS, cells(result, row), strict=True)
            )
            for row in rows
            if row.rounds
        ]
        if timed:
            screen.print(table(str(facet), *COLUMNS, rows=timed, whole=COLUMNS))
        for kind, sentences in remarks(rows).items():
            style = STATUS_STYLES["problem" if kind == "wrong" else "skipped"]
            for sentence in sentences:
                screen.print(Text.assemble((f"{kind}: ", style), sentence))
    screen.print(Text(about(result)))


def _show_losses(result: Result, slower: Sequence[Loss], screen: Console) -> None:
    compared = sum(bool(row.rounds) for row in result.rows)
    for loss in slower:
        screen.print(Text.assemble(("slower: ", STATUS_STYLES["problem"]), str(loss)))
    screen.print(
        Text(
            f"{compared} configurations compared, {len(slower)} slower than the noise of both runs",
            style="bold",
        )
    )
