"""The backward kernel.

It is interpreted against the closed form and the oracle, and compiled for GPUs that are not here.
"""

import json
from pathlib import Path

import pytest
from scripts import printed

pytestmark = pytest.mark.slow

NAMES = (
    *(
        "gemma4",
        "softmax",
        "softmax_bias",
        "zero_experts",
        "sigmoid",
        "sigmoid_renorm",
        "deepseek_v3",
        "deepseek_v2",
    ),
    *(
        "sqrtsoftplus",
        "token_table",
        "sparsemixer",
        "topk_per_group",
        "logit_bias",
        "soft_cap",
        "shared",
    ),
    *("floor_reached", "floor_and_epsilon", "capped_row_sum"),
)
SHARED_MEMORY = {
    "sm_80": 166_912,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
    "gfx942": 65_536,
    "gfx950": 163_840,
}


def output_of(script):
    return json.loads(printed(Path(__file__).with_name(script), interprets=False))


@pytest.fixture(scope="module")
def found():
    return output_of("interpreted_backward.py")


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_closed_form_and_of_autograd_through_the_oracle(found, name):
    cases = {case: problems for case, problems in found.items() if case.startswith(f"{name} ")}
    assert len(cases) == 3
    assert not {case: problems for case, problems in cases.items() if problems}


def test_the_backward_kernel_compiles_without_spills_and_within_the_parts_shared_memory():
    cases = output_of("ahead_of_time_backward.py")
    assert {case["target"] for case in cases} == set(SHARED_MEMORY)
    assert not [case for case in cases if case["spills"]]
    assert not [case for case in cases if case["shared"] > SHARED_MEMORY[case["target"]]]
