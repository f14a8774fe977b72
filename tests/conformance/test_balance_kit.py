"""The kit of ``balance``: eager conforms, wrong backends and a wrong product are caught."""

import random
import re

import pytest
import torch
from mutants import Mutant, registered
from mutants.balancing import CHANGES, MUTANTS, Balances, WithABackward
from mutants.catching import each, must_be_caught, must_be_caught_in_eager, results

from moe_routing.balancing import call
from moe_routing.balancing.problem import BalanceProblem
from moe_routing.cli._app import run as command
from moe_routing.conformance import drawn, run
from moe_routing.conformance.contract import contract_of
from moe_routing.reference import balance_oracle

CONTRACT = contract_of("balance")
HERE = [mutant for mutant in MUTANTS if not mutant.only_on]
ELSEWHERE = {one.caught_by for one in MUTANTS} - {one.caught_by for one in HERE}
"""Checks whose mutants are wrong on a GPU alone."""
NOTHING_FOR_THE_REFERENCE = ("what_it_declines_fails", "a_declared_gap_is_real")
"""Checks with nothing to check on a reference, which declines nothing."""


@pytest.fixture(autouse=True)
def _remembered_kernels(monkeypatch):
    """Let nothing that a test changes be remembered by later calls."""
    monkeypatch.setattr(call, "_kernels", {})


@pytest.mark.parametrize("profile", ["smoke", pytest.param("quick", marks=pytest.mark.slow)])
@pytest.mark.parametrize("clause", CONTRACT.clauses)
def test_eager_conforms(clause, profile):
    seed = random.getrandbits(32)
    report = run("eager", operation="balance", profile=profile, clauses=[clause], seed=seed)
    assert [(result.id, result.message) for result in report.failed] == []
    assert report.ok
    assert report.count("declined") == 0


@pytest.mark.parametrize("mutant", each(HERE))
def test_a_mutant_is_caught_by_the_check_that_is_named_for_it(mutant):
    with registered(mutant) as name:
        must_be_caught(name, mutant)


@pytest.mark.parametrize("change", each(CHANGES))
def test_a_change_of_the_product_is_caught_by_the_check_that_is_named_for_it(change, monkeypatch):
    must_be_caught_in_eager(change, monkeypatch)


@pytest.mark.parametrize("check", sorted({c.name for c in CONTRACT.checks} - ELSEWHERE))
def test_a_right_backend_passes_every_check(check):
    with registered(Mutant(WithABackward, check, operation="balance")) as name:
        found = list(results(name, "balance", check, ["smoke"]))
    assert [result.message for result in found if result.status == "failed"] == []
    if check not in NOTHING_FOR_THE_REFERENCE:
        assert any(result.status == "passed" for result in found)


def test_a_backend_needs_no_backward():
    check = "the_gradient_of_logits_matches_the_oracle"
    with registered(Mutant(Balances, check, operation="balance")) as name:
        found = list(results(name, "balance", check, ["smoke"]))
    assert {result.status for result in found} == {"passed"}


def test_every_check_has_a_mutant_and_every_clause_a_check():
    caught = {one.caught_by for one in (*MUTANTS, *CHANGES)}
    assert caught == {check.name for check in CONTRACT.checks}
    assert len(caught) == len(CONTRACT.checks)
    assert {check.clause for check in CONTRACT.checks} == set(CONTRACT.clauses)


def test_ids_of_checks_are_unique_and_begin_with_the_clause():
    ids = [item.id for item in CONTRACT.items("quick")]
    assert len(set(ids)) == len(ids)
    assert all(re.match(r"\d\d-[a-z]", name) for name in ids)


def test_a_seed_draws_the_same_calls_again():
    (check,) = (check for check in CONTRACT.checks if check.name == "drawn_calls_are_summed")

    def ids_of(seed):
        with drawn.seeded(seed):
            return [item.case.id for item in check.items("quick")]

    assert ids_of(7) == ids_of(7) != ids_of(8)


def test_the_command_checks_the_operation(capsys):
    assert command(["conformance", "eager", "--operation", "balance", "--clause", "2"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert CONTRACT.clauses[2].rule.partition(",")[0] in printed
    assert "eager conforms: " in printed


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus", "logsumexp"])
def test_the_oracles_gradient_is_autograds(score):
    counts = "" if score == "logsumexp" else "ids"
    problem = BalanceProblem(
        score=score, num_experts=5, dtype="float64", counts=counts, topk=2 * bool(counts)
    )
    ids = torch.zeros(1, 3, 2, dtype=torch.int64) if counts else None
    logits, grad = torch.randn(1, 3, 5).double(), torch.randn(1, 5 if counts else 1).double()
    step = torch.zeros_like(logits)
    found = torch.zeros_like(logits)
    for index in range(logits.numel()):  # by central differences of the oracle's own sums
        step.view(-1)[index] = 1e-6
        above, below = (
            balance_oracle.balance(problem, x, ids, None).sums.value
            for x in (logits + step, logits - step)
        )
        found.view(-1)[index] = ((above - below) * grad).sum() / 2e-6
        step.zero_()
    right = balance_oracle.gradient(problem, grad, logits, None).value
    torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"score": "relu"}, "score: expected one of 'softmax'"),
        ({"counts": ""}, "counts: expected one of 'ids', 'best' with the score 'softmax'"),
        ({"score": "sigmoid", "counts": "best"}, "counts: expected one of 'ids' with the score"),
        ({"num_experts": 0}, "num_experts: expected an int of 1 or more"),
        ({"topk": 0}, "topk: expected an int of 1 or more"),
        ({"counts": "best", "topk": 9}, "topk: expected an int of 1 or more, up to num_experts"),
        ({"dtype": "int32"}, "dtype: expected one of bfloat16"),
    ],
)
def test_a_wrong_problem_is_named(wrong, said):
    with pytest.raises(ValueError, match=f"^{said}.*got "):
        BalanceProblem(
            **{"score": "softmax", "num_experts": 8, "dtype": "float32", "topk": 2} | wrong
        )
