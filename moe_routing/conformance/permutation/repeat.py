"""Clause 7: the same bits in any batch, place, run and thread."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from moe_routing.conformance.permutation import _sets, outcomes
from moe_routing.conformance.permutation._check import both
from moe_routing.conformance.permutation.cases import CombineCase, PermuteCase, on_device
from moe_routing.conformance.requirements import require
from moe_routing.conformance.threads import THREADS, made_at_once
from moe_routing.reference import permutation_oracle as oracle

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.permutation.calls import Call
    from moe_routing.conformance.permutation.cases import Case
    from moe_routing.conformance.under_test import BackendUnderTest

RUNS = 50
CALLS = 12
BATCHES = (1, 1, 2, 3, 7, 33, 64, 129, 512)


def _batched(operation: type[Case], profile: Profile) -> Iterator[Case]:
    tokens = 67 if profile == "smoke" else 517
    for case in _sets.of_either_dtype(operation, profile, num_tokens=tokens):
        if not case.masked and case.capacity is None:
            yield case.but(columns=131, rows="cancelling")
            if profile != "smoke" or case.block is None:
                yield case.but(columns=33, topk=22)


@both(7, _batched)
def a_row_has_the_same_bits_in_any_batch(under_test: BackendUnderTest, case: Case) -> None:
    """Rows of a token have the same bits together, permuted, in batches of many sizes, alone."""
    batches = _Batches(case, under_test.device)
    whole = torch.arange(case.num_tokens)
    right = batches.rows_of_tokens(whole, under_test)
    start = 0
    shuffled = torch.randperm(case.num_tokens, generator=case.generator())
    batches.must_equal(shuffled, right, under_test, "permuted")
    for size in BATCHES:
        tokens = whole[start : start + size]
        batches.must_equal(tokens, right, under_test, f"in a batch of {len(tokens)}")
        start = start + size if start + size < case.num_tokens else 0


class _Batches:
    """Calls of some of a case's tokens, each with its own ids, rows and weights."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        generator = case.generator()
        self.ids, plan = case.planned(generator)
        self.call = case.make(torch.device("cpu"))
        if isinstance(case, CombineCase):
            # The row of each pair; those without a place have any.
            place = torch.tensor(oracle.places(plan))
            self.of_pairs = self.call.arguments["rows"][place]

    def call_of(self, tokens: Tensor) -> Call:
        """Make the call of those tokens."""
        plan = self.case.plan_of(self.ids[tokens])
        if isinstance(self.case, PermuteCase):
            changes = {"hidden": self.call.arguments["hidden"][tokens].to(self.device)}
        else:
            rows = self.of_pairs.new_full((plan.order.numel(), self.case.columns), torch.nan)
            place = torch.tensor(oracle.places(plan))
            rows[place[place >= 0]] = self.of_pairs[tokens][place >= 0]
            weights = self.call.arguments["weights"]
            changes = {
                "rows": rows.to(self.device),
                "weights": None if weights is None else weights[tokens].to(self.device),
            }
        return self.call.but(plan=on_device(plan, self.device), **changes)

    def rows_of_tokens(self, tokens: Tensor, under_test: BackendUnderTest) -> list[Tensor]:
        """Return what comes out for each of the tokens, in their order."""
        call = self.call_of(tokens)
        made = [some.cpu() for some in call.made(under_test)]
        if isinstance(self.case, CombineCase):
            return made
        # The row of a token is at the places of all its pairs; those without a place have zeros.
        places = torch.tensor(oracle.places(call.plan))
        return [
            outcomes.rows_of_bytes(some)[places].where(places[..., None] >= 0, torch.tensor(0))
            for some in made
        ]

    def must_equal(
        self, tokens: Tensor, right: list[Tensor], under_test: BackendUnderTest, what: str
    ) -> None:
        """Require for those tokens the bits that they have in the whole."""
        for name, some, whole in zip(
            self.call.names, self.rows_of_tokens(tokens, under_test), right, strict=False
        ):
            same = outcomes.same_bits(some, whole[tokens])
            require(same, f"{name} of tokens {what} have other bits than in the whole")


def _repeated(operation: type[Case], profile: Profile) -> Iterator[Case]:
    return _sets.of_either_dtype(operation, profile, num_tokens=129, rows="cancelling")


@both(7, _repeated)
def the_same_call_gives_the_same_bits(under_test: BackendUnderTest, case: Case) -> None:
    """Fifty runs give the same bits, with other calls of the kind between them."""
    call, other = case.make(under_test.device), case.but(turn=1).make(under_test.device)
    first = call.checked(under_test, "the first run")
    for run in range(2, RUNS + 1):
        _must_equal(call, call.made(under_test), first, f"run {run} of {RUNS}")
        if run % 5 == 0:
            other.made(under_test)


def _must_equal(call: Call, made: tuple[Tensor, ...], right: tuple[Tensor, ...], what: str) -> None:
    """Require the same bits, in a masked plan at the places of pairs."""
    masked = call.layout == "masked" and call.names[0] == "rows"
    full = ~oracle.is_empty(call.plan) if masked else None
    for name, some, first in zip(call.names, made, right, strict=False):
        flat = [outcomes.rows_of_bytes(t.reshape(-1, t.shape[-1])) for t in (some, first)]
        same = flat[0] == flat[1]
        require(bool((same if full is None else same[full]).all()), f"{what}: {name}: other bits")


@both(7, _sets.in_every_form)
def operands_changed_in_place_are_read_again(under_test: BackendUnderTest, case: Case) -> None:
    """Rows, weights and plan may change between two calls, and results before them stay."""
    call = case.make(under_test.device)
    untouched = case.make(under_test.device)
    first = call.checked(under_test, "the first call")
    for turn in (1, 2, 3):
        call.copy_(case.but(turn=turn).make(under_test.device))
        call.checked(under_test, "operands changed in place")
    untouched.must_match(first, "the result of an earlier call")


def _threaded(operation: type[Case], profile: Profile) -> Iterator[Case]:
    return _sets.in_every_form(operation, profile, num_tokens=129)


@both(7, _threaded)
def eight_threads_may_share_a_kernel(under_test: BackendUnderTest, case: Case) -> None:
    """Eight threads that call at once, with rows of their own, get what each would get alone."""
    # Two threads have the same call.
    calls = [case.but(turn=thread // 2).make(under_test.device) for thread in range(THREADS)]
    calls[0].made(under_test)  # whatever is built, is built now
    work = [partial(call.made, under_test) for call in calls]
    for call, (what, made) in zip(calls, made_at_once(work, CALLS), strict=True):
        call.must_match(made[0], what)
        for again in made[1:]:
            _must_equal(call, again, made[0], what)
