"""Streams, graphs, devices and synchronisation: what the checks of every operation do with them."""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from moe_routing.conformance.under_test import NotRunError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from moe_routing.conformance.under_test import BackendUnderTest

TURNS = 4
"""How often a call, or a replay of a graph, follows another."""
SLEEP_CYCLES = 20_000_000
"""About 10 ms on a GPU.

That is long against a launch, so that work on a wrong stream overtakes what it should wait for.
"""
Call = TypeVar("Call")
Made = TypeVar("Made")


def need_cuda(under_test: BackendUnderTest) -> None:
    """Require a CUDA device.

    :raises NotRunError: it is another one.
    """
    if under_test.device.type != "cuda":
        msg = "needs a CUDA device"
        raise NotRunError(msg)


def two_devices(under_test: BackendUnderTest) -> tuple[torch.device, torch.device]:
    """Return the first two devices, and make the first the current one.

    :raises NotRunError: there is one device.
    """
    if under_test.device.type == "cpu" or torch.accelerator.device_count() < 2:  # noqa: PLR2004 -- another one
        msg = "needs a second device"
        raise NotRunError(msg)
    torch.accelerator.set_device_index(0)
    return torch.device(under_test.device.type, 0), torch.device(under_test.device.type, 1)


@contextlib.contextmanager
def side_stream(device: torch.device) -> Iterator[Any]:
    """Enter another stream of the device, where it has streams.

    What it yields keeps the stream busy for a while.
    """
    if device.type == "cpu":
        yield lambda: None
        return
    module = torch.get_device_module(device)
    torch.accelerator.synchronize(device)
    stream = module.Stream(device)
    keep_busy = getattr(module, "_sleep", None)
    with module.stream(stream):
        yield (lambda: keep_busy(SLEEP_CYCLES)) if keep_busy else (lambda: None)
    torch.accelerator.synchronize(device)


def made_in_stream_order(
    device: torch.device,
    calls: Sequence[Call],
    write: Callable[[Call], object],
    make: Callable[[Call], Made],
) -> list[Made]:
    """Make calls on a side stream, each after work there, and after what it reads was written.

    :param write: writes a call's inputs to the memory that all the calls read.
    :param make: makes the call on that memory.
    """
    made = []
    with side_stream(device) as sleep:
        for call in calls:
            sleep()
            write(call)
            made.append(make(call))
    return made


@contextlib.contextmanager
def without_synchronisation(device: torch.device) -> Iterator[None]:
    """Let everything raise that waits for a CUDA device."""
    torch.cuda.synchronize(device)
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def captured(device: torch.device, make: Callable[[], Made]) -> tuple[torch.cuda.CUDAGraph, Made]:
    """Capture a call that has been made once before."""
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
        made = make()
    return graph, made


def replay(graph: torch.cuda.CUDAGraph, device: torch.device) -> None:
    """Replay a graph, and wait for it."""
    graph.replay()
    torch.cuda.synchronize(device)


@contextlib.contextmanager
def _two_streams(device: torch.device) -> Iterator[tuple[torch.cuda.Stream, torch.cuda.Stream]]:
    """Yield two streams that are kept busy for as long, so that what follows runs at once."""
    torch.cuda.synchronize(device)
    streams = torch.cuda.Stream(device), torch.cuda.Stream(device)
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(SLEEP_CYCLES)  # noqa: SLF001 -- torch's own tests use it
    yield streams
    torch.cuda.synchronize(device)


def made_on_two_streams(
    device: torch.device, calls: Sequence[Call], make: Callable[[Call], Made]
) -> list[Made]:
    """Make calls on two streams in turn, which run at once."""
    made = []
    with _two_streams(device) as streams:
        for turn, call in enumerate(calls):
            with torch.cuda.stream(streams[turn % 2]):
                made.append(make(call))
    return made


def replayed_at_once(
    device: torch.device, graphs: Sequence[torch.cuda.CUDAGraph]
) -> Iterator[None]:
    """Replay two graphs at once, several times; yield after each turn, when both are done."""
    for _ in range(TURNS):
        with _two_streams(device) as streams:
            for _ in range(TURNS):
                for stream, graph in zip(streams, graphs, strict=True):
                    with torch.cuda.stream(stream):
                        graph.replay()
        yield
