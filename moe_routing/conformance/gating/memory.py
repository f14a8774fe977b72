"""Clauses 4 and 5: operands as they lie, no tokens, and rows out of range."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import torch

from moe_routing.conformance.cases import LAYOUTS
from moe_routing.conformance.gating import _sets
from moe_routing.conformance.gating._check import check
from moe_routing.conformance.gating.calls import bits_of, must_be_same
from moe_routing.conformance.gating.cases import FACTORS, Case
from moe_routing.conformance.requirements import require
from moe_routing.gating import GateOutput

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.under_test import BackendUnderTest


def _laid_out(profile: Profile) -> Iterator[Case]:
    for layout in LAYOUTS:
        for case in _sets.in_every_form(profile, layout=layout):
            yield case
            if profile != "smoke":
                yield case.but(num_tokens=1)


@check(4, _laid_out)
def operands_of_any_strides_are_read_as_they_lie(under_test: BackendUnderTest, case: Case) -> None:
    """Hidden states, weight and vectors are read as they lie in memory, and are not changed."""
    call = case.make(under_test.device)
    before = {name: tensor.clone() for name, tensor in call.tensors.items()}
    call.checked(under_test)
    for name, tensor in call.tensors.items():
        require(torch.equal(before[name], tensor), f"{name} was changed")


def _vectors(_profile: Profile) -> Iterator[Case]:
    for turn, invariant in product(range(4), _sets.ORDERS):
        yield Case(variant="gemma4", factors=FACTORS, turn=turn, invariant=invariant, columns=1024)


@check(4, _vectors)
def vectors_of_every_dtype_are_read(under_test: BackendUnderTest, case: Case) -> None:
    """Router bias, norm weight and input scale may have any float dtype."""
    call = case.make(under_test.device)
    vectors = ("router_bias", "norm_weight", "input_scale")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        changed = {name: getattr(call.projection, name).to(dtype) for name in vectors}
        call.with_projection(**changed).checked(under_test, f"vectors of {dtype}")


def _empty(profile: Profile) -> Iterator[Case]:
    yield from _sets.in_every_form(profile, num_tokens=0)


@check(4, _empty)
def no_tokens_give_empty_outputs(under_test: BackendUnderTest, case: Case) -> None:
    """T = 0 gives empty outputs of the right shapes and dtypes."""
    case.make(under_test.device).checked(under_test)


def _mixed(profile: Profile) -> Iterator[Case]:
    yield from _sets.in_every_form(profile, num_tokens=16)


@check(5, _mixed)
def a_row_out_of_range_spoils_no_other(under_test: BackendUnderTest, case: Case) -> None:
    """Rows of NaN, infinities and the largest numbers are routed, and leave the others alone."""
    call = case.make(under_test.device)
    right = call.checked(under_test)
    hidden = call.projection.hidden.clone()
    largest = torch.finfo(hidden.dtype).max
    for row, value in enumerate((torch.nan, torch.inf, -torch.inf, largest, -largest)):
        hidden[row] = value
        hidden[row + 5, row] = value
    made = call.with_projection(hidden=hidden).checked(under_test)
    others = slice(10, None)
    for name, one, other in zip(made._fields, made, right, strict=True):
        same = (bits_of(one[others]) == bits_of(other[others])).all()
        require(same, f"{name} of other rows changed")


def _padded(profile: Profile) -> Iterator[Case]:
    for case in _sets.in_every_form(profile, num_tokens=12):
        yield case.but(valid="tensor")
        yield case.but(valid="int", variant="topk_softmax")


@check(5, _padded)
def garbage_in_padding_is_blank(under_test: BackendUnderTest, case: Case) -> None:
    """Rows past num_valid_tokens get ids -1 and weights 0, whatever their hidden states are."""
    call = case.make(under_test.device)
    right = call.checked(under_test)
    valid = int(call.operands["num_valid_tokens"])  # type: ignore[arg-type] # the cases have one
    hidden = call.projection.hidden.clone()
    hidden[valid:] = torch.nan
    made = call.with_projection(hidden=hidden).checked(under_test)
    must_be_same(
        GateOutput(made.weights, made.ids, made.logits[:valid]),
        GateOutput(right.weights, right.ids, right.logits[:valid]),
        "NaN in padding",
    )
