"""Clause 10: streams, graphs, devices and synchronisation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

import moe_routing
from moe_routing.conformance import streams
from moe_routing.conformance.planning import _sets, cases
from moe_routing.conformance.planning._check import check
from moe_routing.conformance.requirements import require
from moe_routing.conformance.streams import TURNS
from moe_routing.conformance.under_test import BackendUnderTest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.planning.cases import Call, Case
    from moe_routing.planning import DispatchPlan


def _modes(profile: Profile) -> Iterator[Case]:
    for tokens in (1, 33, 513, 4099)[: 2 if profile == "smoke" else 4]:
        yield from _sets.in_every_form(profile, num_tokens=tokens)


def _others(call: Call, turns: int) -> list[Call]:
    """Return calls of the same shapes with other ids."""
    return [call.but(ids=call.ids.flip(1).add(n) % call.num_experts) for n in range(turns)]


@check(10, _modes)
def each_call_uses_its_own_ids_in_stream_order(under_test: BackendUnderTest, case: Case) -> None:
    """A call on a side stream waits for what that stream writes; later calls change no plan."""
    call = case.make(under_test.device)
    cases.plan(under_test, call)  # whatever is built, is built now
    live = call.but(ids=call.ids.clone())
    calls = _others(call, TURNS)
    made = streams.made_in_stream_order(
        under_test.device,
        calls,
        lambda other: live.ids.copy_(other.ids),
        lambda _: _planned(under_test, live),
    )
    for other, plan in zip(calls, made, strict=True):
        cases.must_match(other, plan)


def _planned(under_test: BackendUnderTest, call: Call) -> DispatchPlan:
    """Plan without poison, which would be work on the stream."""
    return moe_routing.plan(call.ids, call.num_experts, backend=under_test.backend, **call.options)


@check(10, _modes)
def nothing_is_read_on_the_host(under_test: BackendUnderTest, case: Case) -> None:
    """A call does not synchronise with the device."""
    streams.need_cuda(under_test)
    call = case.make(under_test.device)
    cases.plan(under_test, call)
    with streams.without_synchronisation(under_test.device):
        made = _planned(under_test, call)
    cases.must_match(call, made)


@check(10, _modes, capability="cuda_graphs")
def a_cuda_graph_replays_with_new_ids(under_test: BackendUnderTest, case: Case) -> None:
    """A graph that is captured after one warm-up call replays with other ids."""
    streams.need_cuda(under_test)
    call = case.make(under_test.device)
    cases.plan(under_test, call)
    graph, made = streams.captured(under_test.device, lambda: _planned(under_test, call))
    for other in _others(call, TURNS):
        call.ids.copy_(other.ids)
        streams.replay(graph, under_test.device)
        cases.must_match(call, made)


@check(10, _modes)
def calls_on_two_streams_do_not_meet(under_test: BackendUnderTest, case: Case) -> None:
    """Calls on two streams at once, with ids of their own, share no memory."""
    streams.need_cuda(under_test)
    call = case.make(under_test.device)
    cases.plan(under_test, call)
    calls = _others(call, 2 * TURNS)
    made = streams.made_on_two_streams(
        under_test.device, calls, lambda other: _planned(under_test, other)
    )
    for other, plan in zip(calls, made, strict=True):
        cases.must_match(other, plan, "on two streams at once")


@check(10, _modes, capability="cuda_graphs")
def two_graphs_replayed_at_once_do_not_meet(under_test: BackendUnderTest, case: Case) -> None:
    """Two graphs of one kernel that are replayed at once share no memory."""
    streams.need_cuda(under_test)
    call = case.make(under_test.device)
    cases.plan(under_test, call)
    calls = _others(call, 2)
    captured = [
        streams.captured(under_test.device, lambda other=other: _planned(under_test, other))  # type: ignore[misc] # bound now
        for other in calls
    ]
    for _ in streams.replayed_at_once(under_test.device, [graph for graph, _ in captured]):
        for other, (_, made) in zip(calls, captured, strict=True):
            cases.must_match(other, made, "two graphs at once")


@check(10, _sets.in_every_form, capability="several_devices")
def the_ids_device_is_used(under_test: BackendUnderTest, case: Case) -> None:
    """Ids on another device than the current one are planned there, in turn with the first."""
    calls = [case.make(device) for device in streams.two_devices(under_test)]
    for turn in range(TURNS):
        call = calls[turn % 2]
        cases.checked(BackendUnderTest(under_test.backend, call.ids.device), call)
    require(torch.accelerator.current_device_index() == 0, "the current device was changed")
