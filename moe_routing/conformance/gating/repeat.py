"""Clauses 6 and 7: the same bits in any batch, place, run and thread."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from moe_routing.conformance.gating import _sets
from moe_routing.conformance.gating._check import check
from moe_routing.conformance.gating.calls import must_be_same
from moe_routing.conformance.gating.cases import Case
from moe_routing.conformance.threads import THREADS, made_at_once
from moe_routing.gating import GateOutput

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.gating.calls import Call
    from moe_routing.conformance.under_test import BackendUnderTest

BATCHES = (1, 1, 2, 3, 7, 16, 33, 64, 129, 256, 512)
RUNS = 20
CALLS = 6


def _batched(profile: Profile) -> Iterator[Case]:
    tokens = 131 if profile == "smoke" else 1025
    for case in _sets.in_every_form(profile, hidden="cancelling", num_tokens=tokens):
        if case.invariant:
            yield case
            if profile != "smoke":
                yield case.but(columns=2816, hidden="normal")
                yield case.but(columns=64, hidden="integers")
    yield Case(num_tokens=tokens, num_experts=256, columns=1000, dtype="float32")


@check(6, _batched, capability="invariance")
def a_row_has_the_same_bits_in_any_batch(under_test: BackendUnderTest, case: Case) -> None:
    """Rows have the same bits together, permuted, in batches of many sizes, and of any strides."""
    call = case.make(under_test.device)
    right = call.checked(under_test)
    must_be_invariant(call, right, lambda some: some.made(under_test), case.generator())


def must_be_invariant(
    call: Call, right: GateOutput, made: Callable[[Call], GateOutput], generator: torch.Generator
) -> None:
    """Require the bits of a whole batch of its rows in other batches.

    :param made: gates a call.
    """
    tokens, start = len(right.logits), 0
    shuffled = torch.randperm(tokens, generator=generator).to(call.device)
    _must_equal(made(call.rows(shuffled)), right, shuffled, "permuted")
    wider = torch.cat([call.projection.hidden, call.projection.hidden], dim=1)
    apart = call.with_projection(hidden=wider[:, : call.projection.hidden.shape[1]])
    must_be_same(made(apart), right, "rows apart in memory")
    for size in BATCHES:
        if size > tokens:
            break
        rows = torch.arange(start, start + size, device=call.device)
        _must_equal(made(call.rows(rows)), right, rows, f"in a batch of {size}")
        start = start + size if start + 2 * size + 128 < tokens else 0


def _must_equal(made: GateOutput, right: GateOutput, rows: Tensor, what: str) -> None:
    must_be_same(made, GateOutput(*(part[rows] for part in right)), what)


def _repeated(profile: Profile) -> Iterator[Case]:
    yield from _sets.in_every_form(profile, num_tokens=129, hidden="cancelling")


@check(7, _repeated)
def the_same_call_gives_the_same_bits(under_test: BackendUnderTest, case: Case) -> None:
    """Twenty runs give the same bits, with other calls of the kind between them."""
    call, other = (case.but(turn=turn).make(under_test.device) for turn in range(2))
    right = call.checked(under_test)
    for run in range(2, RUNS + 1):
        if run % 5 == 0:
            other.made(under_test)
        must_be_same(call.made(under_test), right, f"run {run} of {RUNS}")


@check(7, _sets.in_every_form)
def operands_changed_in_place_are_read_again(under_test: BackendUnderTest, case: Case) -> None:
    """Every operand may change between two calls, one at a time; outputs before them stay."""
    call = case.make(under_test.device)
    first = call.checked(under_test)
    kept = GateOutput(*(part.clone() for part in first))
    for name, tensor in call.tensors.items():
        if tensor.dtype.is_floating_point:
            tensor.copy_(tensor.roll(1, 0).mul(-2.0))
            call.checked(under_test, f"after {name} changed")
    must_be_same(first, kept, "the first output, after later calls")


@check(7, _sets.in_every_form)
def eight_threads_may_share_a_gate(under_test: BackendUnderTest, case: Case) -> None:
    """Eight threads that gate at once, each its own hidden states, get what each gets alone."""
    calls = [case.but(turn=thread // 2).make(under_test.device) for thread in range(THREADS)]
    rights = [call.checked(under_test) for call in calls]
    work = [partial(call.made, under_test) for call in calls]
    for right, (what, made) in zip(rights, made_at_once(work, CALLS), strict=True):
        for one in made:
            must_be_same(one, right, what)
