"""Clause 12: streams, graphs, devices and synchronisation."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from moe_routing.conformance import streams
from moe_routing.conformance.checks import _sets
from moe_routing.conformance.checks._check import check
from moe_routing.conformance.requirements import require
from moe_routing.conformance.under_test import BackendUnderTest, must_match, outputs, same_bits

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moe_routing.conformance.cases import Call, Case, Profile


def _modes(profile: Profile) -> Iterator[Case]:
    for case in _sets.of_every_family(profile):
        for tokens in (1, 33, 513):
            yield case.but(num_tokens=tokens)


@check(12, _modes)
def each_call_uses_its_own_inputs_in_stream_order(under_test: BackendUnderTest, case: Case) -> None:
    """A call on a side stream waits for what that stream writes into the logits.

    Later calls do not change its outputs.
    """
    first, second = case.make(under_test.device), case.make(under_test.device)
    second.logits = first.logits.flip(1).clone()
    under_test.route(first)  # whatever is built, is built now
    live = first.logits.clone()
    calls = (first, second)
    routed = streams.made_in_stream_order(
        under_test.device,
        calls,
        lambda call: live.copy_(call.logits),
        lambda call: under_test.route(_on(call, live)),
    )
    for call, output in zip(calls, routed, strict=True):
        must_match(call, output)


def _on(call: Call, logits: torch.Tensor) -> Call:
    return type(call)(call.spec, logits, call.topk, call.operands, call.ids_dtype)


@check(12, _modes)
def nothing_is_read_on_the_host(under_test: BackendUnderTest, case: Case) -> None:
    """A call does not synchronise with the device, with num_valid_tokens on the device either."""
    streams.need_cuda(under_test)
    call = case.but(valid="tensor").make(under_test.device)
    under_test.route(call)
    with streams.without_synchronisation(under_test.device):
        output = under_test.router(call.spec)(call.logits, call.topk, **call.operands)
    must_match(call, output)


@check(12, _modes, capability="cuda_graphs")
def a_cuda_graph_replays_with_new_inputs(under_test: BackendUnderTest, case: Case) -> None:
    """A graph that is captured after one warm-up call replays with other inputs.

    These are other logits and another number of valid tokens.
    """
    streams.need_cuda(under_test)
    call = case.but(valid="tensor").make(under_test.device)
    route = under_test.router(call.spec)
    under_test.route(call)
    graph, output = streams.captured(
        under_test.device, lambda: route(call.logits, call.topk, **call.operands)
    )
    for valid in (case.num_tokens, case.num_tokens // 2):
        call.logits.copy_(call.logits.roll(1, 0).flip(1))
        valid_tokens = call.operands["num_valid_tokens"]
        assert isinstance(valid_tokens, torch.Tensor)  # noqa: S101 -- for mypy: the case says so
        valid_tokens.fill_(valid)
        streams.replay(graph, under_test.device)
        must_match(call, output)


@check(12, _sets.of_every_family, capability="several_devices")
def the_tensors_device_is_used(under_test: BackendUnderTest, case: Case) -> None:
    """Tensors on another device than the current one are routed there."""
    here, there = streams.two_devices(under_test)
    on_each = [
        BackendUnderTest(under_test.backend, device).check(case.make(device))
        for device in (here, there)
    ]
    require(
        on_each[1].ids.device == there, f"expected outputs on {there}, got {on_each[1].ids.device}"
    )
    require(
        same_bits(on_each[0].ids.cpu(), on_each[1].ids.cpu()), "the two devices give different ids"
    )
    require(torch.accelerator.current_device_index() == 0, "the current device was changed")


@check(12, _sets.of_every_family, capability="several_devices")
def one_router_serves_two_devices_in_turn(under_test: BackendUnderTest, case: Case) -> None:
    """Calls of one router on two devices in turn stay apart.

    Each device has logits of its own, and calls with and without outputs to write into.
    """
    calls = [case.make(device) for device in streams.two_devices(under_test)]
    calls[1] = replace(calls[1], logits=calls[1].logits.flip(1))
    for call in calls:
        BackendUnderTest(under_test.backend, call.logits.device).route(call)
    route = under_test.router(calls[0].spec)
    routed = []
    for turn in range(6):
        call = calls[turn % 2]
        given = outputs(
            len(call.logits),
            call.topk + call.spec.shared_experts,
            call.ids_dtype,
            call.logits.device,
        )
        out = given if turn >= 2 else None  # noqa: PLR2004 -- a device's first call has none
        routed.append(
            (
                call,
                route(call.logits, call.topk, ids_dtype=call.ids_dtype, out=out, **call.operands),
            )
        )
    for call, output in routed:
        must_match(call, output)
    require(torch.accelerator.current_device_index() == 0, "the current device was changed")
