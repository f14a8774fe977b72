"""The kernels, interpreted on the CPU, against the float64 oracle."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

NAMES = [
    "gemma4",
    "softmax",
    "softmax_bias",
    "zero_experts",
    "sigmoid",
    "sigmoid_renorm",
    "sigmoid_bias",
    "deepseek_v3",
    "one_group",
    "deepseek_v2",
    "top2_of_logits",
    "sqrtsoftplus",
    "token_table",
    "sparsemixer",
    "topk_per_group",
    "logit_bias",
    "soft_cap",
    "shared",
]


def interpreted(*shares):
    """Interpret these cases, each share of them in a process of its own.

    Return what is wrong with each case.
    """

    def run(share):
        command = [sys.executable, str(Path(__file__).with_name("interpreted.py")), share]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    with ThreadPoolExecutor(len(shares)) as pool:
        return {
            case: problems for cases in pool.map(run, shares) for case, problems in cases.items()
        }


@pytest.fixture(scope="module")
def found():
    parts = os.cpu_count() or 1
    return interpreted(*(f"{part}/{parts}" for part in range(1, parts + 1)))


def test_the_cooperative_kernel_agrees_with_the_oracle_for_gemma4():
    assert interpreted("cooperative gemma4 torch.float32 hostile") == {
        "cooperative gemma4 torch.float32 hostile": []
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_cooperative_kernel_agrees_with_the_oracle_on_awkward_rows(found, name):
    cases = {
        case: problems
        for case, problems in found.items()
        if case.startswith(f"cooperative {name} ")
    }
    assert len(cases) == 3
    assert not {case: problems for case, problems in cases.items() if problems}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["gemma4", "softmax", "softmax_bias", "sigmoid_renorm", "logit_bias", "soft_cap", "shared"],
)
def test_the_thread_per_row_kernel_agrees_with_the_oracle_and_bit_for_bit_with_the_cooperative_one(
    found, name
):
    cases = {
        case: problems
        for case, problems in found.items()
        if case.startswith(f"thread_per_row {name} ")
    }
    assert len(cases) == 3
    assert not {case: problems for case, problems in cases.items() if problems}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("gemma4", 4),
        ("softmax", 4),
        ("sigmoid_renorm", 4),
        ("sigmoid_bias", 8),
        ("soft_cap", 8),
        ("shared", 4),
    ],
)
def test_the_filter_kernel_agrees_with_the_oracle_and_with_the_cooperative_kernel_bit_for_bit(
    found, name, rows
):
    cases = {
        case: problems for case, problems in found.items() if case.startswith(f"filter {name} ")
    }
    assert len(cases) == rows
    assert not {case: problems for case, problems in cases.items() if problems}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "deepseek_v3",
        "one_group",
        "deepseek_v2",
        "top2_of_logits",
        "softmax_bias",
        "sqrtsoftplus",
        "logit_bias",
        "zero_experts",
        "soft_cap",
    ],
)
def test_the_block_kernel_agrees_with_the_oracle_and_with_the_cooperative_kernel_bit_for_bit(
    found, name
):
    cases = {
        case: problems for case, problems in found.items() if case.startswith(f"block {name} ")
    }
    assert len(cases) == 5
    assert not {case: problems for case, problems in cases.items() if problems}


@pytest.mark.slow
def test_approximate_scores_are_off_by_no_more_than_the_filters_threshold_is_lowered(found):
    assert found["approximate scores"] == []


@pytest.mark.slow
def test_random_cases_of_every_variant_agree_with_the_oracle_and_with_the_cooperative_kernel(found):
    cases = {case: problems for case, problems in found.items() if case.startswith("drawn ")}
    variants = {
        variant
        for case in cases
        for variant in ("cooperative", "thread_per_row", "filter", "block")
        if f"'{variant}'" in case
    }
    assert (len(cases), len(variants)) == (24, 4)
    assert not {case: problems for case, problems in cases.items() if problems}
