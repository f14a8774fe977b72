"""Each wrong backend that permutes or combines, and each wrong change of the product, is caught.

The check that is named for it catches it. A right backend fails no check.
"""

import re

import pytest
import torch
from mutants import Mutant, registered
from mutants.catching import each, must_be_caught, must_be_caught_in_eager, results, traced
from mutants.permutation import CHANGES, MUTANTS, Combines, Permutes
from mutants.permutation.gradients import WithABackward

from moe_routing.conformance import drawn
from moe_routing.conformance.contract import contract_of
from moe_routing.conformance.permutation import moved
from moe_routing.permutation import call

HERE = [mutant for mutant in MUTANTS if not mutant.only_on]
OPERATIONS = ("permute", "combine")
CONTRACTS = {operation: contract_of(operation) for operation in OPERATIONS}
CHECKS = {
    (operation, check.name): check
    for operation in OPERATIONS
    for check in CONTRACTS[operation].checks
}
TRACED = traced("permute") | traced("combine")
NOTHING_FOR_THE_REFERENCE = ("what_it_declines_fails", "a_declared_gap_is_real")
"""Checks with nothing to check on a reference, which declines nothing."""
ELSEWHERE = {(one.operation, one.caught_by) for one in MUTANTS} - {
    (one.operation, one.caught_by) for one in HERE
}
"""Checks whose mutants are wrong on a GPU alone."""


@pytest.fixture(autouse=True)
def _remembered_kernels(monkeypatch):
    """Let nothing that a test changes be remembered by later calls."""
    monkeypatch.setattr(call, "_kernels", {})


@pytest.mark.parametrize("mutant", each(HERE))
def test_a_mutant_is_caught_by_the_check_that_is_named_for_it(mutant):
    with registered(mutant) as name:
        must_be_caught(name, mutant)


@pytest.mark.parametrize("change", each(CHANGES))
def test_a_change_of_the_product_is_caught_by_the_check_that_is_named_for_it(change, monkeypatch):
    must_be_caught_in_eager(change, monkeypatch)


@pytest.mark.parametrize(
    ("operation", "check"),
    [
        pytest.param(operation, name, marks=[pytest.mark.slow] * (name in TRACED))
        for operation, name in sorted(set(CHECKS) - ELSEWHERE)
    ],
)
def test_a_right_backend_passes_every_check(operation, check):
    reference = Permutes if operation == "permute" else WithABackward
    with registered(Mutant(reference, check, operation=operation)) as name:
        found = list(results(name, operation, check, ["smoke"]))
    assert [result.message for result in found if result.status == "failed"] == []
    if check not in NOTHING_FOR_THE_REFERENCE:
        assert any(result.status == "passed" for result in found)


def test_a_backend_that_combines_needs_no_backward():
    check = "gradients_of_rows_and_weights_match_the_oracle"
    with registered(Mutant(Combines, check, operation="combine")) as name:
        found = list(results(name, "combine", check, ["smoke"]))
    assert {result.status for result in found} == {"passed"}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_check_has_a_mutant_and_every_clause_a_check(operation):
    caught = {one.caught_by for one in (*MUTANTS, *CHANGES) if one.operation == operation}
    contract = CONTRACTS[operation]
    assert caught == {check.name for check in contract.checks}
    assert len(caught) == len(contract.checks)
    assert {check.clause for check in contract.checks} == set(contract.clauses)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_ids_of_checks_are_unique_and_begin_with_the_clause(operation):
    ids = [item.id for item in CONTRACTS[operation].items("quick")]
    assert len(set(ids)) == len(ids)
    assert all(re.match(r"\d\d-[a-z]", name) for name in ids)


@pytest.mark.parametrize(
    ("operation", "check"),
    [("permute", "rows_of_every_size_are_moved"), ("combine", "sums_of_every_size_are_right")],
)
def test_every_size_of_the_lists_is_in_a_quick_case(operation, check):
    cases = [item.case for item in CHECKS[operation, check].items("quick")]
    assert {case.num_tokens for case in cases} == set(moved.TOKENS)
    assert {case.topk for case in cases} == set(moved.TOPK)
    assert {case.columns for case in cases} == set(moved.COLUMNS)


@pytest.mark.parametrize(
    ("operation", "check"),
    [("permute", "drawn_calls_are_permuted"), ("combine", "drawn_calls_are_combined")],
)
def test_a_seed_draws_the_same_calls_again(operation, check):
    def ids_of(seed):
        with drawn.seeded(seed):
            return [item.case.id for item in CHECKS[operation, check].items("quick")]

    assert ids_of(7) == ids_of(7) != ids_of(8)
    assert all("-seed7" in name for name in ids_of(7))


def test_the_cases_of_a_check_are_the_same_values_on_every_machine():
    item = next(CHECKS["combine", "pairs_without_a_place_add_nothing"].items("smoke"))
    first, again = (item.case.make(torch.device("cpu")) for _ in range(2))
    assert torch.equal(first.rows, again.rows) or first.rows.isnan().any()
    assert torch.equal(first.weights, again.weights)
    assert torch.equal(first.plan.order, again.plan.order)
