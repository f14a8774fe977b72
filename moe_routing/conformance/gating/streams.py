"""Clause 11: streams, graphs, devices and synchronisation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moe_routing.conformance import streams
from moe_routing.conformance.gating import _sets
from moe_routing.conformance.gating._check import check
from moe_routing.conformance.requirements import require
from moe_routing.conformance.streams import TURNS
from moe_routing.conformance.under_test import BackendUnderTest
from moe_routing.gating import GateOutput

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.gating.calls import Call
    from moe_routing.conformance.gating.cases import Case


def _sizes(profile: Profile) -> Iterator[Case]:
    for tokens in (1, 33, 513)[: 2 if profile == "smoke" else 3]:
        yield from _sets.in_every_form(profile, num_tokens=tokens)


def _others(call: Call, case: Case) -> list[Call]:
    """Return calls of the same shapes with other hidden states, and all else as in this one."""
    return [
        call.with_projection(
            hidden=case.but(turn=turn).make(call.device).projection.hidden.contiguous()
        )
        for turn in range(1, TURNS + 1)
    ]


@check(11, _sizes)
def each_call_uses_its_own_inputs_in_stream_order(under_test: BackendUnderTest, case: Case) -> None:
    """A call on a side stream waits for what that stream writes; later calls change no output."""
    call = case.make(under_test.device)
    call.made(under_test)  # whatever is built, is built now
    live = call.with_projection(hidden=call.projection.hidden.clone())
    calls = _others(call, case)
    made = streams.made_in_stream_order(
        under_test.device,
        calls,
        lambda other: live.projection.hidden.copy_(other.projection.hidden),
        lambda _: live.made(under_test),
    )
    for other, one in zip(calls, made, strict=True):
        other.must_match(one)


@check(11, _sizes)
def nothing_is_read_on_the_host(under_test: BackendUnderTest, case: Case) -> None:
    """A call does not synchronise with the device."""
    streams.need_cuda(under_test)
    call = case.make(under_test.device)
    call.made(under_test)
    with streams.without_synchronisation(under_test.device):
        made = call.made(under_test)
    call.must_match(made)


@check(11, _sizes, capability="cuda_graphs")
def a_cuda_graph_replays_with_new_inputs(under_test: BackendUnderTest, case: Case) -> None:
    """A graph that is captured after one warm-up call replays with other hidden states."""
    streams.need_cuda(under_test)
    call = case.make(under_test.device)
    call.made(under_test)
    graph, made = streams.captured(under_test.device, lambda: call.made(under_test))
    for other in _others(call, case):
        call.projection.hidden.copy_(other.projection.hidden)
        streams.replay(graph, under_test.device)
        call.must_match(GateOutput(*made))


@check(11, _sizes)
def calls_on_two_streams_do_not_meet(under_test: BackendUnderTest, case: Case) -> None:
    """Calls on two streams at once, with hidden states of their own, share no memory."""
    streams.need_cuda(under_test)
    call = case.make(under_test.device)
    call.made(under_test)
    calls = _others(call, case)
    made = streams.made_on_two_streams(
        under_test.device, calls, lambda other: other.made(under_test)
    )
    for other, one in zip(calls, made, strict=True):
        other.must_match(one, "on two streams at once")


@check(11, _sizes, capability="cuda_graphs")
def two_graphs_replayed_at_once_do_not_meet(under_test: BackendUnderTest, case: Case) -> None:
    """Two graphs of one kernel that are replayed at once share no memory."""
    streams.need_cuda(under_test)
    call = case.make(under_test.device)
    call.made(under_test)
    calls = _others(call, case)[:2]
    captured = [
        streams.captured(under_test.device, lambda other=other: other.made(under_test))  # type: ignore[misc] # bound now
        for other in calls
    ]
    for _ in streams.replayed_at_once(under_test.device, [graph for graph, _ in captured]):
        for other, (_, made) in zip(calls, captured, strict=True):
            other.must_match(made, "two graphs at once")


@check(11, _sets.in_every_form, capability="several_devices")
def the_tensors_device_is_used(under_test: BackendUnderTest, case: Case) -> None:
    """Tensors on another device than the current one are gated there, in turn with the first."""
    calls = [case.make(device) for device in streams.two_devices(under_test)]
    for turn in range(TURNS):
        call = calls[turn % 2]
        call.checked(BackendUnderTest(under_test.backend, call.device))
    require(torch.accelerator.current_device_index() == 0, "the current device was changed")
