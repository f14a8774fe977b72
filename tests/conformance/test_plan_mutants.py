"""Each wrong backend that plans, and each wrong change of the product, fails the check it names.

A right backend fails no check.
"""

import re

import pytest
import torch
from mutants import Mutant, registered
from mutants.catching import each, must_be_caught, must_be_caught_in_eager, results, traced
from mutants.planning import CHANGES, MUTANTS, Reference

from moe_routing.conformance import drawn
from moe_routing.conformance.plan_clauses import CLAUSES
from moe_routing.conformance.planning import PLAN, order
from moe_routing.planning import call, latest

HERE = [mutant for mutant in MUTANTS if not mutant.only_on]
CHECKS = {check.name: check for check in PLAN.checks}
TRACED = traced("plan")
NOTHING_FOR_THE_REFERENCE = ("what_it_declines_cannot_be_planned", "a_declared_gap_is_real")
"""Checks with nothing to check on the reference, which declines nothing."""
NEEDS_CUDA = {mutant.caught_by for mutant in MUTANTS} - {mutant.caught_by for mutant in HERE}


@pytest.fixture(autouse=True)
def _remembered_calls(monkeypatch):
    """Let nothing that a test changes be remembered by later calls."""
    monkeypatch.setattr(call, "_calls", {})
    monkeypatch.setattr(latest, "_kept", [None])


@pytest.mark.parametrize("mutant", each(HERE))
def test_a_mutant_is_caught_by_the_check_that_is_named_for_it(mutant):
    with registered(mutant) as name:
        must_be_caught(name, mutant)


@pytest.mark.parametrize("change", each(CHANGES))
def test_a_change_of_the_product_is_caught_by_the_check_that_is_named_for_it(change, monkeypatch):
    must_be_caught_in_eager(change, monkeypatch)


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in TRACED))
        for name in sorted(set(CHECKS) - NEEDS_CUDA)
    ],
)
def test_a_right_backend_passes_every_check(check):
    with registered(Mutant(Reference, check, operation="plan")) as name:
        found = list(results(name, "plan", check))
    assert [result.message for result in found if result.status == "failed"] == []
    if check not in NOTHING_FOR_THE_REFERENCE:
        assert any(result.status == "passed" for result in found)


def test_every_check_has_a_mutant_and_every_clause_a_check():
    caught = {one.caught_by for one in (*MUTANTS, *CHANGES)}
    assert caught == set(CHECKS)
    assert len(CHECKS) == len(PLAN.checks)
    assert {check.clause for check in PLAN.checks} == set(CLAUSES)


def test_ids_of_checks_are_unique_and_begin_with_the_clause():
    ids = [item.id for item in PLAN.items("quick")]
    assert len(set(ids)) == len(ids)
    assert all(re.match(r"\d\d-[a-z]", name) for name in ids)


def test_every_size_of_the_lists_is_in_a_quick_case():
    cases = [
        item.case for item in CHECKS["pairs_are_ordered_by_expert_token_and_slot"].items("quick")
    ]
    assert {case.num_tokens for case in cases} == set(order.TOKENS)
    assert {case.topk for case in cases} == set(order.TOPK)
    assert {case.num_experts for case in cases} == set(order.EXPERTS)


def test_a_seed_draws_the_same_calls_again():
    def ids_of(seed):
        with drawn.seeded(seed):
            return [item.case.id for item in CHECKS["drawn_calls_are_planned"].items("quick")]

    assert ids_of(7) == ids_of(7) != ids_of(8)
    assert all(name.endswith("-seed7") for name in ids_of(7))


def test_the_cases_of_a_check_are_the_same_values_on_every_machine():
    item = next(CHECKS["the_pairs_of_least_weight_are_dropped"].items("smoke"))
    first, again = (item.case.make(torch.device("cpu")) for _ in range(2))
    assert torch.equal(first.ids, again.ids)
    assert torch.equal(first.weights, again.weights)
