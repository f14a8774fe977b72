"""``measure``: check every implementation, time those that are right, in turns."""

from __future__ import annotations

import contextlib
import importlib.util
import platform
from datetime import datetime, timezone
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

import moe_routing
from moe_routing.bench import _clock
from moe_routing.bench._implementation import NotMeasuredError, cache_of, fitting
from moe_routing.bench._result import Result, Row
from moe_routing.bench.plan import PLAN
from moe_routing.bench.route import ROUTE
from moe_routing_registry.containment import PluginFailure, contained

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from moe_routing.bench._implementation import Implementation, Inputs
    from moe_routing.bench._result import AnyCase, AnySettings

OPERATIONS = {"route": ROUTE, "plan": PLAN}
"""What each operation that can be measured brings."""


def measure(
    settings: AnySettings,
    *,
    cases: Sequence[AnyCase] | None = None,
    on_case: Callable[[Result, int, int], None] | None = None,
) -> Result:
    """Measure everything that the settings name.

    :param cases: only these of the settings' cases.
    :param on_case: called after each case with the result so far, how many cases are done, and how
        many there are.
    :raises ValueError: the device is not here, its memory is too small, or triton, which times
        graphs, is not here.
    :raises UnknownNameError: no such router or backend.
    :raises BackendUnavailableError: no backend fits, or one that was named does not.
    """
    info = moe_routing.probe(settings.device)
    for case in settings.cases if cases is None else cases:
        OPERATIONS[settings.operation].check_memory(case, info)
    device = torch.empty(0, device=settings.device).device
    if "graph" in settings.modes and importlib.util.find_spec("triton") is None:
        msg = (
            "modes: expected call or host without triton, which times graphs, got graph; "
            "pip install 'moe-routing[triton]'"
        )
        raise ValueError(msg)
    with _one_thread(device), torch.no_grad():
        return _measure(settings, device, settings.cases if cases is None else cases, on_case)


def described(device: torch.device | str) -> dict[str, Any]:
    """Return what two runs must have in common, and the size of the device's last cache in bytes.

    :raises ValueError: the device is not here.
    """
    info = moe_routing.probe(device)
    device = torch.empty(0, device=device).device
    threads = 1 if device.type == "cpu" else 0
    return {
        "name": info.name, "platform": info.platform, "arch": info.arch, "threads": threads,
        "cache": cache_of(device),
    }  # fmt: skip


def _measure(
    settings: AnySettings,
    device: torch.device,
    cases: Sequence[AnyCase],
    on_case: Callable[[Result, int, int], None] | None,
) -> Result:
    explain = OPERATIONS[settings.operation].explain
    fit = [
        (case, fitting(settings.backends, partial(explain, case, settings.device)))
        for case in cases
    ]
    triton = moe_routing.probe(device).toolchain("triton")
    result = Result(
        settings=settings,
        device=described(device),
        versions={
            "moe-routing": moe_routing.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": (triton.version if triton else None) or "",
        },
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        copy_rate=_clock.copy_rate(device),
        launch_floor={mode: _clock.launch_floor(mode, device) for mode in settings.modes},
    )
    for done, (case, names) in enumerate(fit, start=1):
        result.rows += _rows(case, names, settings, device, result.device["cache"])
        if on_case is not None:
            on_case(result, done, len(cases))
    return result


@contextlib.contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """Use one thread on a CPU, as ``torch.utils.benchmark`` does.

    On a busy machine several wait for each other, long.
    """
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _rows(
    case: AnyCase, names: list[str], settings: AnySettings, device: torch.device, cache: int
) -> list[Row]:
    """Check and time one case: backends first, then what they are compared with."""
    operation = OPERATIONS[settings.operation]
    inputs = operation.make(case, device, cache)
    asked = [*((name, True) for name in names), *((name, False) for name in settings.compare)]
    implementations: list[Implementation] = []
    rows: list[Row] = []
    for name, is_backend in asked:
        wrong, skipped = [], ""
        try:
            with contained("it", NotMeasuredError):
                bring = operation.backend if is_backend else operation.comparison
                implementation = bring(name, inputs)
                wrong = operation.problems(implementation, inputs)
        except NotMeasuredError as error:
            skipped = str(error)
        except PluginFailure as failure:  # compilers raise anything; the row says it
            skipped = failure.sentence.removeprefix("it raised ")
            wrong = [f"raised {skipped}"] if is_backend else []
        if wrong or skipped:
            rows += [
                Row(
                    case=case,
                    mode=mode,
                    implementation=name,
                    is_backend=is_backend,
                    wrong=tuple(wrong),
                    skipped="" if wrong else skipped,
                )
                for mode in settings.modes
            ]
        else:
            implementations.append(implementation)
    rows += _timed(implementations, inputs, settings)
    return sorted(
        rows,
        key=lambda row: (
            settings.modes.index(row.mode),
            asked.index((row.implementation, row.is_backend)),
        ),
    )


def _timed(
    implementations: list[Implementation], inputs: Inputs, settings: AnySettings
) -> list[Row]:
    rows = []
    for mode in settings.modes:
        refused = [_clock.refusal(mode, implementation) for implementation in implementations]
        rounds: list[list[float]] = [[] for _ in implementations]
        for _ in range(_clock.ROUNDS):
            for implementation, why_not, times in zip(
                implementations, refused, rounds, strict=True
            ):
                if not why_not:
                    times.append(round(_clock.round_of(mode, implementation, inputs), 4))
        rows += [
            Row(
                case=inputs.case, mode=mode,
                implementation=implementation.name, is_backend=implementation.is_backend,
                rounds=tuple(times), bytes=inputs.bytes, skipped=why_not,
            )
            for implementation, why_not, times in zip(implementations, refused, rounds, strict=True)
        ]  # fmt: skip
    return rows
