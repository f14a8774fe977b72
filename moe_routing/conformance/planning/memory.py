"""Clause 6: dtypes, strides, outputs, and no tokens at all."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from moe_routing.conformance.planning import _sets, cases, ids
from moe_routing.conformance.planning._check import check
from moe_routing.conformance.planning.cases import POISON, Call, Case
from moe_routing.conformance.requirements import require
from moe_routing.conformance.under_test import same_bits
from moe_routing.planning import DispatchPlan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.under_test import BackendUnderTest

GUARD = 1024
"""Elements before and after each part of a plan that must stay as they are."""


def must_fill_and_keep_to(under_test: BackendUnderTest, call: Call) -> None:
    """Plan into memory between guards, and require the right plan there and the guards whole."""
    parts: list[Tensor | None] = []
    whole: list[Tensor] = []
    for shape in call.shapes:
        if shape is None:
            parts.append(None)
            continue
        size = torch.Size(shape).numel()
        memory = torch.full(
            (GUARD + size + GUARD,), POISON, dtype=torch.int32, device=call.ids.device
        )
        whole.append(memory)
        parts.append(memory[GUARD : GUARD + size].view(shape))
    out = DispatchPlan(*parts)  # type: ignore[arg-type]  # only the last two may be None
    made = cases.plan(under_test, call, out)
    require(made is out, "out: not what is returned")
    cases.must_match(call, out, "out")
    names = (name for name, part in zip(out._fields, out, strict=True) if part is not None)
    for name, memory in zip(names, whole, strict=True):
        around = torch.cat((memory[:GUARD], memory[-GUARD:]))
        require(bool((around == POISON).all()), f"{name}: elements before or after it are changed")


def _forms(profile: Profile) -> Iterator[Case]:
    for tokens, topk, experts in ((33, 8, 64), (1, 1, 300), (130, 6, 60)):
        for case in _sets.in_every_form(profile, num_tokens=tokens, topk=topk):
            yield case.but(num_experts=experts)


@check(6, _forms)
def given_outputs_are_filled_and_nothing_else(under_test: BackendUnderTest, case: Case) -> None:
    """Every element of given outputs is written, and not an element before or after them."""
    must_fill_and_keep_to(under_test, case.make(under_test.device))


def _memories(profile: Profile) -> Iterator[Case]:
    for memory, dtype in product(ids.MEMORY, ("int32", "int64")):
        for case in _sets.in_every_form(profile):
            yield case.but(memory=memory, ids_dtype=dtype)
        yield Case(memory=memory, ids_dtype=dtype, num_tokens=1, topk=3)
        yield Case(memory=memory, ids_dtype=dtype, ids="other_ranks")
        if profile != "smoke":
            yield Case(memory=memory, ids_dtype=dtype, num_tokens=2053, topk=6, num_experts=300)


@check(6, _memories)
def ids_of_any_strides_are_read_as_they_lie(under_test: BackendUnderTest, case: Case) -> None:
    """Ids and weights are read as they lie in memory, and are not changed."""
    call = case.make(under_test.device)
    before = [t.clone() for t in (call.ids, call.weights) if t is not None]
    cases.checked(under_test, call)
    after = [t for t in (call.ids, call.weights) if t is not None]
    for name, old, new in zip(("ids", "weights"), before, after, strict=False):
        require(same_bits(old.contiguous(), new.contiguous()), f"{name}: were changed")


MODES: dict[str, Callable[[], Any]] = {
    "torch.inference_mode": torch.inference_mode,
    "torch.no_grad": torch.no_grad,
    "torch.enable_grad": torch.enable_grad,
}


@check(6, _sets.in_every_form)
def gradients_and_grad_modes_change_nothing(under_test: BackendUnderTest, case: Case) -> None:
    """Weights that require gradients, and calls in every mode of gradients, give the same plan."""
    call = case.but(topk=7).make(under_test.device)
    if call.weights is not None:
        call = call.but(weights=call.weights.requires_grad_())
    before = "nothing"
    for mode in [*MODES, *reversed(MODES)]:
        what = f"in {mode} after {before}"
        try:
            with MODES[mode]():
                made = cases.plan(under_test, call)
        except (RuntimeError, ValueError) as error:
            msg = f"{what}: raises {type(error).__name__}: {error}"
            raise AssertionError(msg) from error
        cases.must_match(call, made, what)
        before = mode


def _empty(profile: Profile) -> Iterator[Case]:
    for case in _sets.in_every_form(profile, num_tokens=0):
        yield case
        yield case.but(num_experts=1, topk=1, ids_dtype="int64")


@check(6, _empty)
def no_tokens_give_a_plan_without_pairs(under_test: BackendUnderTest, case: Case) -> None:
    """T = 0 gives parts of the right shapes, with counts of 0."""
    call = case.make(under_test.device)
    cases.checked(under_test, call)
    must_fill_and_keep_to(under_test, call)
