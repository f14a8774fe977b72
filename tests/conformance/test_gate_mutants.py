"""Each wrong backend that gates, and each wrong change of the product, is caught.

The check that is named for it catches it. A right backend fails no check.
"""

import re

import pytest
from mutants import Mutant, registered
from mutants.catching import each, must_be_caught, must_be_caught_in_eager, results, traced
from mutants.gating import CHANGES, MUTANTS, PLANS, Fused, Planned, Projects
from mutants.gating._mutant import ROUTES

from moe_routing.conformance.contract import contract_of
from moe_routing.conformance.runner import backend_under_test, evaluate
from moe_routing.gating import call

CONTRACT = contract_of("gate")
CHECKS = {check.name: check for check in CONTRACT.checks}
TRACED = traced("gate")
HERE = [mutant for mutant in MUTANTS if not mutant.only_on]
"""The others are wrong on a CUDA device alone; tests/test_on_a_gpu.py holds the kit to those."""
ON_CUDA = {mutant.caught_by for mutant in MUTANTS if mutant.only_on}
NOTHING_FOR_THE_REFERENCE = ON_CUDA | {
    "what_it_declines_cannot_be_gated", "a_declared_gap_is_real", "what_is_gated_is_planned",
}  # fmt: skip


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


@pytest.mark.parametrize("reference", [Projects, Fused])
@pytest.mark.parametrize(
    "check", [pytest.param(name, marks=[pytest.mark.slow]) for name in sorted(CHECKS)]
)
def test_a_right_backend_passes_every_check(check, reference):
    # What is compiled is the product's operator, the same for every backend: `eager` meets all of
    # those cases below.
    profiles = ["smoke"] if check in TRACED else ["smoke", "quick"]
    with registered(Mutant(reference, check, operation="gate", others=ROUTES)) as name:
        found = list(results(name, "gate", check, profiles))
    assert [result.message for result in found if result.status == "failed"] == []
    if check not in NOTHING_FOR_THE_REFERENCE:
        assert any(result.status == "passed" for result in found)


def test_a_right_backend_that_plans_passes_the_check_of_plans():
    check = "what_is_gated_is_planned"
    with registered(Mutant(Planned, check, operation="gate", others=PLANS)) as name:
        found = list(results(name, "gate", check, ["smoke"]))
    assert [result.message for result in found if result.status == "failed"] == []
    assert any(result.status == "passed" for result in found)


def test_every_check_has_a_mutant_and_every_clause_a_check():
    caught = {one.caught_by for one in (*MUTANTS, *CHANGES)}
    assert caught == set(CHECKS)
    assert {check.clause for check in CONTRACT.checks} == set(CONTRACT.clauses)


def test_ids_of_checks_are_unique_and_begin_with_the_clause():
    for profile in ("smoke", "quick"):
        ids = [item.id for item in CONTRACT.items(profile)]
        assert len(set(ids)) == len(ids)
        assert all(re.match(r"\d\d-[a-z]", name) for name in ids)


QUICK = [name for name in CHECKS if name not in TRACED]


@pytest.mark.parametrize(
    ("profile", "checks"),
    [("smoke", QUICK), pytest.param("quick", list(CHECKS), marks=pytest.mark.slow)],
    ids=["smoke", "quick"],
)
def test_eager_gates_as_the_contract_says(profile, checks):
    under_test = backend_under_test("eager", "cpu")
    items = [item for item in CONTRACT.items(profile) if item.check.name in checks]
    found = [evaluate(item, under_test) for item in items]
    assert [f"{one.id}: {one.message}" for one in found if one.status == "failed"] == []
    assert any(one.status == "passed" for one in found)
