"""Clause 10: streams, graphs, devices and synchronisation."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

from moe_routing.conformance.checks.streams import side_stream, two_devices
from moe_routing.conformance.permutation import _sets
from moe_routing.conformance.permutation._check import both, require
from moe_routing.conformance.planning.streams import need_cuda, two_streams
from moe_routing.conformance.under_test import BackendUnderTest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.permutation.calls import Call
    from moe_routing.conformance.permutation.cases import Case

TURNS = 4


def _modes(operation: type[Case], profile: Profile) -> Iterator[Case]:
    for tokens, columns in ((1, 40), (33, 129), (513, 64))[: 2 if profile == "smoke" else 3]:
        yield from _sets.in_every_form(operation, profile, num_tokens=tokens, columns=columns)


def _others(case: Case, turns: int, device: torch.device) -> list[Call]:
    """Return calls of the same shapes with other rows, weights and plans."""
    return [case.but(turn=turn + 1).make(device) for turn in range(turns)]


@both(10, _modes)
def each_call_uses_its_own_operands_in_stream_order(
    under_test: BackendUnderTest, case: Case
) -> None:
    """A call on a side stream waits for what that stream writes; later calls change no result."""
    live = case.make(under_test.device)
    live.made(under_test)  # whatever is built, is built now
    calls = _others(case, TURNS, under_test.device)
    with side_stream(under_test.device) as sleep:
        made = []
        for other in calls:
            sleep()
            live.copy_(other)
            made.append(live.made(under_test))
    for other, result in zip(calls, made, strict=True):
        other.must_match(result)


@both(10, _modes)
def nothing_is_read_on_the_host(under_test: BackendUnderTest, case: Case) -> None:
    """A call does not synchronise with the device."""
    need_cuda(under_test)
    call = case.make(under_test.device)
    call.made(under_test)
    torch.cuda.synchronize(under_test.device)
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        made = call.made(under_test)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    call.must_match(made)


def _captured(
    under_test: BackendUnderTest, call: Call
) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """Capture a call that has been made once before."""
    graph = torch.cuda.CUDAGraph()
    with (
        torch.cuda.device(under_test.device),
        torch.cuda.graph(graph, stream=torch.cuda.Stream(under_test.device)),
    ):
        made = call.made(under_test)
    return graph, made


@both(10, _modes, capability="cuda_graphs")
def a_cuda_graph_replays_with_new_operands(under_test: BackendUnderTest, case: Case) -> None:
    """A graph that is captured after one warm-up call replays with other rows and plans."""
    need_cuda(under_test)
    call = case.make(under_test.device)
    call.made(under_test)
    torch.cuda.synchronize(under_test.device)
    graph, made = _captured(under_test, call)
    for other in _others(case, TURNS, under_test.device):
        call.copy_(other)
        graph.replay()
        torch.cuda.synchronize(under_test.device)
        other.must_match(made)


@both(10, _modes)
def calls_on_two_streams_do_not_meet(under_test: BackendUnderTest, case: Case) -> None:
    """Calls on two streams at once, with operands of their own, share no memory."""
    need_cuda(under_test)
    case.make(under_test.device).made(under_test)
    calls = _others(case, 2 * TURNS, under_test.device)
    made = []
    with two_streams(under_test.device) as streams:
        for turn, other in enumerate(calls):
            with torch.cuda.stream(streams[turn % 2]):
                made.append(other.made(under_test))
    for other, result in zip(calls, made, strict=True):
        other.must_match(result, "on two streams at once")


@both(10, _modes, capability="cuda_graphs")
def two_graphs_replayed_at_once_do_not_meet(under_test: BackendUnderTest, case: Case) -> None:
    """Two graphs of one kernel that are replayed at once share no memory."""
    need_cuda(under_test)
    case.make(under_test.device).made(under_test)
    calls = _others(case, 2, under_test.device)
    torch.cuda.synchronize(under_test.device)
    captured = [_captured(under_test, other) for other in calls]
    for _ in range(TURNS):
        with two_streams(under_test.device) as streams:
            for _ in range(TURNS):
                for stream, (graph, _made) in zip(streams, captured, strict=True):
                    with torch.cuda.stream(stream):
                        graph.replay()
        for other, (_, made) in zip(calls, captured, strict=True):
            other.must_match(made, "two graphs at once")


@both(10, _sets.in_every_form, capability="several_devices")
def the_rows_device_is_used(under_test: BackendUnderTest, case: Case) -> None:
    """Rows on another device than the current one stay there, in turn with the first."""
    calls = [case.make(device) for device in two_devices(under_test)]
    for turn in range(TURNS):
        call = calls[turn % 2]
        call.checked(BackendUnderTest(under_test.backend, call.device))
    require(torch.accelerator.current_device_index() == 0, "the current device was changed")
