"""Clause 16: recorded ids in place of selection."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from moe_routing.conformance.checks import _sets, traced
from moe_routing.conformance.checks._check import check
from moe_routing.conformance.requirements import require
from moe_routing.conformance.under_test import must_match, outputs, same_bits
from moe_routing.conformance.variants import VARIANTS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from moe_routing.conformance.cases import Call, Case, Profile
    from moe_routing.conformance.under_test import BackendUnderTest

EVERY_ROW = 98
"""Tokens with which every kind of row has every slot of 8 (``cases.make_record``), and more."""
SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)


def _recorded(profile: Profile) -> Iterator[Case]:
    for case in _sets.of_every_variant(profile, tokens=EVERY_ROW):
        yield case.but(recorded=True)
    for case in _sets.of_every_family(profile, tokens=EVERY_ROW):
        yield case.but(recorded=True, mapped=True, valid="tensor", ids_dtype="int64")
        yield case.but(recorded=True, num_tokens=1)
        if profile != "smoke":
            yield case.but(recorded=True, layout="transposed", valid="int")
            yield case.but(recorded=True, dtype="float64")
            yield case.but(recorded=True, num_tokens=0)


@check(16, _recorded)
def recorded_ids_are_weighed(under_test: BackendUnderTest, case: Case) -> None:
    """Rows of every kind of record are right, with ``out`` and in later calls too."""
    call = case.make(under_test.device)
    before = call.operands["ids"].clone()  # type: ignore[union-attr] # the case has a record
    output = under_test.route(call)
    require(torch.equal(call.operands["ids"], before), "ids: were changed")  # type: ignore[arg-type] # likewise
    must_match(call, output)
    shape = (len(call.logits), call.topk + call.spec.shared_experts)
    given = outputs(*shape, call.ids_dtype, under_test.device)
    for how, again in (("later", under_test.route(call)), ("out", under_test.route(call, given))):
        same = same_bits(again.ids, output.ids) and same_bits(again.weights, output.weights)
        require(same, f"{how}: not the outputs of the first call")


@check(16, _sets.where(_sets.of_every_variant, tokens=EVERY_ROW))
def a_record_gives_the_bits_of_the_call_that_made_it(
    under_test: BackendUnderTest, case: Case
) -> None:
    """The ids that a call returned give its bits again, in all rows or in some of them."""
    call = case.but(valid="tensor").make(under_test.device)
    plain = under_test.check(call)
    whole = plain.ids[:, : call.topk]
    odd = torch.arange(case.num_tokens, device=under_test.device)[:, None] % 2 == 1
    for what, record in (
        ("all rows", whole),
        ("every second row", whole.masked_fill(odd, -1)),
        ("no row", torch.full_like(whole, -1)),
    ):
        again = under_test.route(call.but(ids=record))
        for name, got, expected in zip(("weights", "ids"), again, plain, strict=True):
            if not same_bits(got, expected):
                row = int((got != expected).any(-1).nonzero()[0])
                msg = (
                    f"a record of {what}: {name} of row {row} are {got[row].tolist()}, "
                    f"without it {expected[row].tolist()}"
                )
                raise AssertionError(msg)


@check(16, _sets.of_every_family)
def a_record_may_have_any_integer_dtype(under_test: BackendUnderTest, case: Case) -> None:
    """Signed integers of every width mean the same, uint8 likewise where nothing is -1."""
    call = case.but(recorded=True).make(under_test.device)
    record = _within(call, case.num_experts)
    for dtype in SIGNED:
        _must_be_right(under_test, call.but(ids=record.to(dtype)), f"ids of {dtype}")
    full = record.masked_fill(record < 0, case.num_experts - 1)
    _must_be_right(under_test, call.but(ids=full.to(torch.uint8)), "ids of torch.uint8")
    apart = torch.full((*record.shape, 2), -1, device=under_test.device)[..., 0]
    apart.copy_(record)
    _must_be_right(under_test, call.but(ids=apart), "ids with strides")


def _within(call: Call, num_experts: int) -> Tensor:
    """Return the call's record without the ids that no expert has."""
    record = call.operands["ids"].long()  # type: ignore[union-attr] # the case has one
    return torch.where((record < -1) | (record >= num_experts), num_experts - 1, record)


def _must_be_right(under_test: BackendUnderTest, call: Call, what: str) -> None:
    output = under_test.route(call)
    try:
        must_match(call, output)
    except AssertionError as error:
        msg = f"{what}: {error}"
        raise AssertionError(msg) from error


@check(16, _sets.of_every_family)
def ids_that_no_expert_has_are_padding(under_test: BackendUnderTest, case: Case) -> None:
    """An id outside [-1, E), however far, makes a row padding, and spoils no other."""
    call = case.but(recorded=True).make(under_test.device)
    record, E = _within(call, case.num_experts), case.num_experts
    for number in (E, E + 1, 2**15, 2**31 - 1, 2**31, 2**32, 2**62, -2, -(2**31), -(2**62)):
        wrong = record.clone()
        wrong[::3, -1] = number
        _must_be_right(under_test, call.but(ids=wrong), f"ids of {number}")


@check(16, _sets.where(_sets.of_every_variant, tokens=EVERY_ROW))
def slots_without_an_expert_weigh_nothing(under_test: BackendUnderTest, case: Case) -> None:
    """The weight of a slot of -1 is 0, whatever the logit and the scale of the first expert."""
    call = case.but(recorded=True).make(under_test.device)
    for value in (torch.nan, torch.inf, -torch.inf):
        some = replace(call, logits=call.logits.clone())
        some.logits[::3, 0] = value
        _must_be_right(under_test, some, f"a first logit of {value}")
        scale = call.operands.get("per_expert_scale")
        if scale is not None:
            scale = scale.clone()
            scale[0] = value
            _must_be_right(
                under_test, call.but(per_expert_scale=scale), f"a first scale of {value}"
            )


def _trained(profile: Profile) -> Iterator[Case]:
    for case in _sets.of_every_variant("smoke", tokens=EVERY_ROW):
        yield case.but(recorded=True)
    if profile != "smoke":
        for case in _sets.of_every_family("quick", tokens=EVERY_ROW):
            yield case.but(recorded=True, dtype="bfloat16", mapped=True, valid="tensor")


@check(16, _trained, capability="gradients")
def gradients_are_those_at_the_recorded_experts(under_test: BackendUnderTest, case: Case) -> None:
    """Gradients of logits and scale match autograd through the oracle at the recorded experts."""
    traced.compare_gradients(under_test, case, case.make(under_test.device))


@check(16, _sets.where(_sets.of_every_family, tokens=EVERY_ROW), capability="compile")
def recorded_ids_are_traced(under_test: BackendUnderTest, case: Case) -> None:
    """A compiled call gives the bits of the plain one; export, fake tensors and opcheck pass."""
    recorded = case.but(recorded=True)
    traced.compiles_as_one_graph(under_test, recorded)
    traced.exports(under_test, recorded)
    traced.fake_tensors_give_fake_outputs(under_test, recorded)
    traced.the_operator_passes_opcheck(under_test, recorded)
    traced.the_operator_of_training_passes_opcheck(under_test, recorded)


BY_BIAS = tuple(variant for variant, spec in VARIANTS.items() if spec.needs_bias)


@check(16, _sets.where(_sets.of_every_variant, variants=BY_BIAS))
def a_bias_does_not_weigh_what_is_recorded(under_test: BackendUnderTest, case: Case) -> None:
    """Biases of any size change nothing in rows with a record."""
    call = case.but(recorded=True).make(under_test.device)
    call.operands["ids"] = _within(call, case.num_experts).clamp(min=0)
    plain = under_test.check(call)
    for value in (0.0, 1e4, -1e30, torch.nan):
        bias = torch.full((case.num_experts,), value, device=under_test.device)
        bias[::3] = 1.0
        again = under_test.route(call.but(bias=bias))
        same = same_bits(again.ids, plain.ids) and same_bits(again.weights, plain.weights)
        require(same, f"a bias of {value}: not the outputs under another bias")
