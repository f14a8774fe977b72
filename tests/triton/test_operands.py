"""Optional operands in the Triton kernels: interpreted, and compiled for GPUs that are not here."""

import json
import random
from pathlib import Path

import pytest
from scripts import printed


def process(script, *arguments, interprets=True):
    """Return what a script of this folder prints as JSON."""
    return json.loads(printed(Path(__file__).with_name(script), *arguments, interprets=interprets))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("check", "declined"),
    [
        ("recorded_ids_are_weighed", {"hash_sqrtsoftplus", "sparsemixer"}),
        ("slots_without_an_expert_weigh_nothing", {"hash_sqrtsoftplus", "sparsemixer"}),
        ("gradients_are_those_at_the_recorded_experts", {"hash_sqrtsoftplus", "sparsemixer"}),
        ("a_record_may_have_any_integer_dtype", set()),
        ("ids_that_no_expert_has_are_padding", set()),
        ("a_mask_says_which_rows_are_padding", set()),
        ("gradients_of_masked_rows_are_zero", set()),
        ("slots_of_logical_experts_are_counted", set()),
        ("counts_may_lie_anywhere", set()),
        ("a_call_with_a_plan_counts_once", set()),
        ("gradients_flow_past_counts", set()),
        ("each_row_gets_a_replica_of_its_experts", set()),
        ("numbers_of_replicas_are_clamped", set()),
        ("tables_may_lie_anywhere", set()),
        ("shared_experts_have_the_weights_of_the_call", set()),
        ("logical_experts_are_counted", set()),
        ("gate", set()),
    ],
)
def test_the_kit_holds_for_optional_operands(check, declined):
    seed = str(random.getrandbits(32))
    found = process("interpreted_operands.py", check, seed)
    assert not {case: said for case, said in found.items() if said[0] == "failed"}
    assert [said[0] for said in found.values()].count("passed") >= 2
    # Families of plug-ins may have no formula here.
    ours = {case.partition("-")[0] for case, said in found.items() if said[0] != "passed"}
    assert declined <= ours <= declined | {name for name in ours if "." in name}
    assert len(found) > len(ours)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("check", "launch"),
    [("slots_of_logical_experts_are_counted", 0), ("logical_experts_are_counted", 1)],
)
def test_a_second_kernel_counts_the_slots_of_many_tokens(check, launch):
    seed = str(random.getrandbits(32))
    found = process("interpreted_operands.py", check, seed, "slots=20", f"launch={launch}")
    assert not {case: said for case, said in found.items() if said[0] == "failed"}
    assert [said[0] for said in found.values()].count("passed") >= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("check", "layout"),
    [
        ("recorded_ids_are_weighed", "transposed"),
        ("recorded_ids_are_weighed", "contiguous"),
        ("a_record_gives_the_bits_of_the_call_that_made_it", "contiguous"),
        ("ids_that_no_expert_has_are_padding", "sliced"),
    ],
)
def test_a_program_weighs_many_rows_wherever_they_lie(check, layout):
    seed = str(random.getrandbits(32))
    for rows in ("rows=4", "rows=8"):
        words = (check, seed, rows, f"layout={layout}")
        found = process("interpreted_operands.py", *words)
        assert not {case: said for case, said in found.items() if said[0] == "failed"}
        assert [said[0] for said in found.values()].count("passed") >= 2


@pytest.mark.slow
def test_a_record_gives_the_bits_of_calls_whose_groups_are_no_power_of_two():
    """Kernels pad such groups, and sum a row in the places that come of it."""
    check = "a_record_gives_the_bits_of_the_call_that_made_it"
    seed = str(random.getrandbits(32))
    found = process("interpreted_operands.py", check, seed, "experts=72")
    assert not {case: said for case, said in found.items() if said[0] == "failed"}
    grouped = [case for case in found if case.startswith("grouped_softmax-E72")]
    assert found[grouped[0]][0] == "passed"


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_kernels_that_read_them_compile_without_spills(target):
    found = process("ahead_of_time_operands.py", target, interprets=False)
    assert len(found) >= 6
    assert not {name for name, used in found.items() if used["spills"]}
    assert {name for name in found if "ids" in name} == {name for name in found if "weigh" in name}
