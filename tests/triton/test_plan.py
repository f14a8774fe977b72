"""The kernels of ``plan`` in Triton's interpreter."""

import json
import random
from pathlib import Path

import pytest
from scripts import printed

from moe_routing.conformance.contract import contract_of


def interpreted(*arguments, script="interpreted_plan.py"):
    return printed(Path(__file__).with_name(script), *arguments)


@pytest.mark.parametrize("cases", [7, pytest.param(42, marks=pytest.mark.slow)])
def test_every_kind_of_launch_makes_the_plan_of_the_definition(cases):
    interpreted("drawn", str(random.getrandbits(32)), str(cases))


@pytest.mark.slow
def test_ids_are_read_where_32_bits_do_not_count_the_places_between_them(tmp_path):
    interpreted("far", str(tmp_path / "ids"))


FIRST_LATER = 6
NEED_A_GPU = {
    "nothing_is_read_on_the_host",
    "a_cuda_graph_replays_with_new_ids",
    "calls_on_two_streams_do_not_meet",
    "two_graphs_replayed_at_once_do_not_meet",
    "the_ids_device_is_used",
}
OF_THE_KIT = {
    "shipped": {
        "given_outputs_are_filled_and_nothing_else": 8,
        "ids_of_any_strides_are_read_as_they_lie": 96,
        "gradients_and_grad_modes_change_nothing": 4,
        "no_tokens_give_a_plan_without_pairs": 4,
        "wrong_arguments_raise_and_are_named": 6,
        "the_same_call_gives_the_same_bits": 1,
        "operands_changed_in_place_are_read_again": 4,
        "compiles_as_one_graph": 1,
        "exports_and_comes_back": 1,
        "fake_tensors_give_fake_plans": 4,
        "the_operator_passes_opcheck": 1,
        "each_call_uses_its_own_ids_in_stream_order": 4,
    },
    "two": {
        "given_outputs_are_filled_and_nothing_else": 8,
        "operands_changed_in_place_are_read_again": 4,
        "eight_threads_may_share_a_kernel": 1,
    },
}
"""Checks of the clauses from 6 on that need no GPU, and how many cases of each.

``make test-gpu`` runs all of them.
"""


@pytest.mark.slow
@pytest.mark.parametrize("launches", OF_THE_KIT)
def test_the_later_clauses_of_the_kit_hold_in_the_interpreter(launches):
    asked = OF_THE_KIT[launches]
    said = interpreted(launches, json.dumps(asked), script="interpreted_plan_kit.py")
    found = json.loads(said)
    assert {check: len(results) for check, results in found.items()} == asked
    assert not [
        (check, case, *result)
        for check, results in found.items()
        for case, result in results.items()
        if result[0] != "passed"
    ]


def test_every_check_that_runs_without_a_gpu_is_among_those():
    later = {check.name for check in contract_of("plan").checks if check.clause >= FIRST_LATER}
    assert later - NEED_A_GPU == set().union(*OF_THE_KIT.values())
