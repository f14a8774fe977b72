"""Every clause runs on every family, and a seed draws the same cases again."""

import itertools
import re
import subprocess
import sys

import pytest
import torch

from moe_routing.conformance import checks, drawn, run
from moe_routing.conformance.clauses import CLAUSES
from moe_routing.conformance.drawn import seeded
from moe_routing.conformance.variants import VARIANTS, fits
from moe_routing.families import FAMILIES
from moe_routing.reference.compare import logical_ids

OF_A_ROUTER = [number for number in CLAUSES if number]
"""Clause 0 is about a backend's spec."""


def test_every_clause_has_a_case_of_every_built_in_family():
    cells = {(item.case.family, item.check.clause) for item in checks.ROUTE.items("quick")}
    assert [cell for cell in itertools.product(FAMILIES, OF_A_ROUTER) if cell not in cells] == []


def test_a_check_that_is_not_about_some_variants_alone_runs_on_every_family():
    about_some = {
        "groups_are_scored_as_the_spec_says": "groups",
        "group_sums_beyond_float32_are_equal": "groups",
        "scores_below_minus_one_are_ranked_too": "biases",
        "nan_keeps_its_bias": "biases",
        "weights_are_gathered_not_subtracted": "biases",
        "shares_far_below_the_best_have_exact_weights": "biases",
        "biases_that_are_not_finite_follow_the_rule": "biases",
        "biases_of_every_value_are_ranked_right": "biases",
        "masked_experts_come_last": "biases",
        "a_bias_does_not_weigh_what_is_recorded": "biases",
        "scales_of_every_sign_are_used": "scales of experts",
        "scales_that_are_not_finite_scale_their_expert_alone": "scales of experts",
        "scales_that_are_not_finite_spoil_no_other_gradient": "scales of experts",
        "large_tables_are_read_to_their_end": "token tables",
        "tokens_without_experts_are_padding": "token tables",
        "ids_come_in_exact_order_for_many_tokens": "accelerators, where it takes long",
        "more_than_2_31_logits_are_routed": "the full profile, where it takes long",
        "wrong_arguments_raise_and_are_named": "one argument each, whatever the family",
        "wrong_specs_raise_and_name_the_field": "no family",
    }
    on = {
        check.name: {item.case.family for item in check.items("quick")}
        for check in checks.ROUTE.checks
        if check.clause
    }
    assert set(about_some) <= set(on)
    partly = {name for name, families in on.items() if not set(FAMILIES) <= families}
    assert partly == set(about_some)


def ids_of(seed, profile="quick"):
    with seeded(seed):
        return [case.id for case in drawn.cases(profile)]


def test_a_seed_draws_the_same_cases_again_and_is_in_their_names():
    assert ids_of(7) == ids_of(7)
    assert ids_of(7) != ids_of(8)
    assert all(name.endswith("-seed7") for name in ids_of(7))


def test_drawn_cases_can_be_routed_and_are_of_every_variant(request):
    with seeded(request.config.getoption("--hypothesis-seed")):
        cases = list(drawn.cases("full"))
    assert {case.variant for case in cases} == set(VARIANTS)
    assert all(fits(case.spec, case.num_experts, case.topk) for case in cases)
    assert max(case.num_experts for case in cases) > 1024


def test_each_run_draws_a_seed_of_its_own():
    first, second = (run("eager", profile="smoke", clauses=[9]) for _ in range(2))
    assert first.seed != second.seed
    assert first.to_dict()["seed"] == first.seed


@pytest.mark.slow
def test_a_run_draws_its_cases_from_the_seed_that_it_is_given():
    report = run("eager", profile="smoke", clauses=[1], seed=7)
    drawn_cases = [
        result.case for result in report.results if result.check == "drawn_sizes_are_routed"
    ]
    assert drawn_cases == ids_of(7, "smoke")
    assert report.seed == 7


@pytest.mark.slow
def test_pytest_processes_draw_the_same_cases_and_take_a_seed():
    words = [
        "-q",
        "-p",
        "no:cacheprovider",
        "--pyargs",
        "moe_routing.conformance",
        "--moe-backend",
        "eager",
    ]
    words += ["-k", "drawn_sizes and topk_softmax", "-rA"]
    drawn_anew, given = (
        subprocess.run(
            [sys.executable, "-m", "pytest", *words, *more],
            capture_output=True,
            text=True,
            check=False,
        ).stdout
        for more in (["-n", "2"], ["--moe-seed", "7"])
    )
    assert "2 passed" in drawn_anew
    assert "2 passed" in given
    assert len(set(re.findall(r"^PASSED .*-seed7-eager-cpu\]$", given, re.MULTILINE))) == 2


@pytest.mark.slow
def test_the_command_takes_a_seed_and_says_it():
    code = "from moe_routing.cli import main; main()"
    words = [sys.executable, "-c", code, "conformance", "eager", "--clause", "9", "--seed", "7"]
    ran = subprocess.run(words, capture_output=True, text=True, check=True)
    assert ran.stdout.rstrip().endswith("seed 7")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_physical_ids_are_undone_however_large_they_are(dtype):
    physical = torch.iinfo(dtype).max - torch.tensor([3, 0, 2, 1], dtype=dtype)
    ids = torch.cat([physical.long(), torch.tensor([-1, 0, torch.iinfo(dtype).max - 4])])
    assert logical_ids(ids[None], physical).tolist() == [[0, 1, 2, 3, -1, -1, -1]]


def test_physical_ids_that_experts_share_cannot_be_undone():
    said = "expected a physical id of its own for each of 4 experts, got 3 different ids"
    with pytest.raises(ValueError, match=rf"^expert_map: {said}$"):
        logical_ids(torch.tensor([[1]]), torch.tensor([5, -1, 1, -1]))
