"""Each deliberately wrong backend fails the check that its row names.

A right backend fails no check.
"""

import random
import re
from itertools import chain

import pytest
from mutants import MUTANTS, Mutant, Reference, counts, registered, replicas, shared
from mutants.catching import each, must_be_caught_in_eager, must_say

from moe_routing.conformance import checks, drawn
from moe_routing.conformance.clauses import CLAUSES
from moe_routing.conformance.runner import backend_under_test, evaluate, run

HERE = [mutant for mutant in MUTANTS if not mutant.only_on]
NOTHING_FOR_THE_REFERENCE = (
    "what_it_declines_cannot_be_had",
    "what_is_prepared_serves_calls_with_and_without_out",
)
"""Checks with nothing to check on the reference, which declines nothing and prepares nothing."""


def results(mutant, check):
    """Run one check on the mutant's variants, and return the results.

    The profile is the smallest that has cases which can catch the mutant.
    """
    with registered(mutant) as name, drawn.seeded(random.getrandbits(32)):
        under_test = backend_under_test(name, "cpu")
        items = chain(checks.named(check).items("smoke"), checks.named(check).items("quick"))
        for item in items:
            if not mutant.variants or getattr(item.case, "variant", None) in mutant.variants:
                yield evaluate(item, under_test)


def test_there_are_at_least_twenty_mutants():
    assert len({mutant.name for mutant in HERE}) >= 20


@pytest.mark.parametrize("mutant", HERE, ids=lambda mutant: f"{mutant.name}-by-{mutant.caught_by}")
def test_a_mutant_is_caught_by_the_check_that_is_named_for_it(mutant):
    must_say(mutant.saying, results(mutant, mutant.caught_by))


@pytest.mark.parametrize("change", each([*counts.CHANGES, *replicas.CHANGES, *shared.CHANGES]))
def test_a_change_of_the_product_is_caught_by_the_check_that_is_named_for_it(change, monkeypatch):
    must_be_caught_in_eager(change, monkeypatch)


@pytest.mark.parametrize("check", sorted({mutant.caught_by for mutant in HERE}))
def test_what_catches_a_mutant_lets_the_right_backend_pass(check):
    caught = [mutant for mutant in HERE if mutant.caught_by == check]
    variants = tuple({variant for mutant in caught for variant in mutant.variants})
    operands = frozenset[str]().union(*(mutant.operands for mutant in caught))
    right = Mutant(Reference, check, "", variants, operands=operands)
    found = list(results(right, check))
    assert [result.message for result in found if result.status == "failed"] == []
    if check not in NOTHING_FOR_THE_REFERENCE:
        assert any(result.status == "passed" for result in found)


def test_every_clause_has_a_check_and_every_check_a_name_of_its_own():
    assert {check.clause for check in checks.ROUTE.checks} == set(CLAUSES)
    assert len({check.name for check in checks.ROUTE.checks}) == len(checks.ROUTE.checks)


def test_ids_of_checks_are_unique_and_begin_with_the_clause():
    ids = [item.id for item in checks.ROUTE.items("quick")]
    assert len(set(ids)) == len(ids)
    assert all(re.match(r"\d\d-[a-z]", name) for name in ids)


def test_a_wrong_backend_does_not_conform():
    with registered(next(m for m in MUTANTS if m.name == "mutant-nan-first")) as name:
        report = run(name, profile="smoke", clauses=[3])
    assert not report.ok
    failed = [result for result in report.failed if result.check == "nan_and_inf_follow_the_rule"]
    assert "(one NaN)" in failed[0].message
