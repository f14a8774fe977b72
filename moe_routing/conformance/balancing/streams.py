"""Clause 8: streams, graphs, devices and synchronisation."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import torch

from moe_routing.conformance import streams
from moe_routing.conformance.balancing._check import check
from moe_routing.conformance.balancing.cases import KINDS, Case
from moe_routing.conformance.requirements import require
from moe_routing.conformance.streams import TURNS
from moe_routing.conformance.under_test import BackendUnderTest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moe_routing.conformance.balancing.cases import Call
    from moe_routing.conformance.cases import Profile


def _modes(profile: Profile) -> Iterator[Case]:
    for kind, tokens in product(KINDS, (1, 33, 513)[: 2 if profile == "smoke" else 3]):
        yield Case(kind=kind, tokens=tokens, mask="some")


def _others(case: Case, turns: int, device: torch.device) -> list[Call]:
    """Return calls of the same shapes with other logits, ids and masks."""
    return [case.but(turn=turn + 1).make(device) for turn in range(turns)]


@check(8, _modes)
def each_call_uses_its_own_operands_in_stream_order(
    under_test: BackendUnderTest, case: Case
) -> None:
    """A call on a side stream waits for what that stream writes; later calls change no result."""
    live = case.make(under_test.device)
    live.made(under_test)  # whatever is built, is built now
    calls = _others(case, TURNS, under_test.device)
    made = streams.made_in_stream_order(
        under_test.device, calls, live.copy_, lambda _: live.made(under_test)
    )
    for other, result in zip(calls, made, strict=True):
        other.must_match(result)


@check(8, _modes)
def nothing_is_read_on_the_host(under_test: BackendUnderTest, case: Case) -> None:
    """A call does not synchronise with the device, and neither does its way back."""
    streams.need_cuda(under_test)
    call = case.make(under_test.device)
    leaf = call.logits.detach().requires_grad_()
    live = call.but(logits=leaf)
    grad = torch.ones_like(live.made(under_test)[0])
    torch.autograd.grad(live.made(under_test)[0], leaf, grad)
    with streams.without_synchronisation(under_test.device):
        made = live.made(under_test)
        torch.autograd.grad(made[0], leaf, grad)
    call.must_match(made)


@check(8, _modes, capability="cuda_graphs")
def a_cuda_graph_replays_with_new_operands(under_test: BackendUnderTest, case: Case) -> None:
    """A graph that is captured after one warm-up call replays with other logits and ids."""
    streams.need_cuda(under_test)
    call = case.make(under_test.device)
    call.made(under_test)
    graph, made = streams.captured(under_test.device, lambda: call.made(under_test))
    for other in _others(case, TURNS, under_test.device):
        call.copy_(other)
        streams.replay(graph, under_test.device)
        other.must_match(made)


@check(8, _modes)
def calls_on_two_streams_do_not_meet(under_test: BackendUnderTest, case: Case) -> None:
    """Calls on two streams at once, with operands of their own, share no memory."""
    streams.need_cuda(under_test)
    case.make(under_test.device).made(under_test)
    calls = _others(case, 2 * TURNS, under_test.device)
    made = streams.made_on_two_streams(
        under_test.device, calls, lambda other: other.made(under_test)
    )
    for other, result in zip(calls, made, strict=True):
        other.must_match(result, "on two streams at once")


@check(8, lambda _: [Case(kind=kind) for kind in KINDS], capability="several_devices")
def the_logits_device_is_used(under_test: BackendUnderTest, case: Case) -> None:
    """Logits on another device than the current one stay there, in turn with the first."""
    calls = [case.make(device) for device in streams.two_devices(under_test)]
    for turn in range(TURNS):
        call = calls[turn % 2]
        call.checked(BackendUnderTest(under_test.backend, call.device))
    require(torch.accelerator.current_device_index() == 0, "the current device was changed")
