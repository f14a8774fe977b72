"""The kernels, compiled to machine code for GPUs that are not here."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from scripts import printed

pytestmark = pytest.mark.slow

SHARED_MEMORY = {
    "sm_80": 166_912,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
    "gfx942": 65_536,
    "gfx950": 163_840,
}
SCRIPT = Path(__file__).with_name("ahead_of_time.py")
OF_PLAN = Path(__file__).with_name("ahead_of_time_plan.py")
OF_GATE = Path(__file__).with_name("ahead_of_time_gate.py")
OF_BALANCE = Path(__file__).with_name("ahead_of_time_balance.py")
OF_PERMUTATION = Path(__file__).with_name("ahead_of_time_permutation.py")
WORTH_A_LOOK = 1.05
"""A kernel may need up to this many times what the table says.

One that needs more has lost something, or the table must be written again.
"""


@pytest.fixture(scope="module")
def compiled():
    """What the compilers say of every case of ``route``, by target."""
    return by_target(SCRIPT)


def by_target(script):
    """Compile for each target in a process, as many at a time as there are cores."""

    def of(target):
        return json.loads(printed(script, target, interprets=False))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(SHARED_MEMORY, pool.map(of, SHARED_MEMORY), strict=True))


@pytest.mark.parametrize("target", SHARED_MEMORY)
def test_every_variant_compiles_without_spills_and_within_the_parts_shared_memory(compiled, target):
    found = compiled[target]["cases"]
    assert found
    assert not [case for case in found if case["spills"] or case["frame"]]
    assert not [case for case in found if case["shared"] > SHARED_MEMORY[target]]


@pytest.mark.parametrize(
    ("target", "when"),
    [("sm_80", "never"), ("sm_90", "first"), ("sm_100", "first"), ("sm_120", "first")],
)
def test_a_kernel_that_may_start_early_waits_before_it_touches_memory(compiled, target, when):
    assert {case["waits"] for case in compiled[target]["cases"]} == {when}


@pytest.mark.parametrize("target", SHARED_MEMORY)
def test_no_kernel_needs_more_registers_or_instructions_than_the_table_says(compiled, target):
    table, now = json.loads(SCRIPT.with_suffix(".json").read_text()), compiled[target]
    write_again = "python tests/triton/ahead_of_time.py --write"
    assert now["triton"] == table["triton"], (
        f"the table was written with another Triton; write it again: {write_again}"
    )
    names = ("target", "spec", "E", "K", "dtype", "kernel")
    known, ships, found = (
        {tuple(case[name] for name in names): case for case in cases if case["target"] == target}
        for cases in (table["cases"], now["ships"], now["cases"])
    )
    assert set(ships) == set(known), (
        f"other kernels than in the table; write it again: {write_again}"
    )
    assert set(found) <= set(known)
    assert not [key for key, case in known.items() if case["spills"]]
    more = [
        f"{key}: {what} {known[key][what]} -> {case[what]}"
        for key, case in found.items()
        for what in ("registers", "instructions")
        if case[what] > WORTH_A_LOOK * known[key][what]
    ]
    assert not more, "\n".join([f"fix the kernel, or accept the new numbers: {write_again}", *more])


def test_the_kernels_of_plan_compile_without_spills_and_within_the_parts_shared_memory():
    for target, found in by_target(OF_PLAN).items():
        assert found["cases"], target
        assert not [case for case in found["cases"] if case["spills"]], target
        assert not [case for case in found["cases"] if case["shared"] > SHARED_MEMORY[target]]


@pytest.fixture(scope="module")
def permutations():
    """What the compilers say of the kernels of ``permute`` and ``combine``, by target."""
    return {target: found["cases"] for target, found in by_target(OF_PERMUTATION).items()}


@pytest.mark.parametrize("target", SHARED_MEMORY)
def test_the_kernels_of_permute_and_combine_compile_without_spills_and_wait_first(
    permutations, target
):
    found = permutations[target]
    assert len({case["kernel"] for case in found}) == 4
    assert not [case for case in found if case["spills"]]
    assert not [case for case in found if case["shared"] > SHARED_MEMORY[target]]
    waits = {"sm_80": "never", "gfx942": None, "gfx950": None}.get(target, "first")
    assert {case.get("waits") for case in found} == {waits}


@pytest.mark.parametrize("target", SHARED_MEMORY)
def test_rows_of_whole_vectors_are_read_and_written_16_bytes_at_a_time(permutations, target):
    wide = {case["kernel"]: case["wide"] for case in permutations[target] if case["H"] == 2816}
    K = 8
    assert wide["moe_routing_permute"] >= 1 + K
    assert wide["moe_routing_permute_quantized"] >= 1 + K
    assert wide["moe_routing_combine"] >= K + 1
    assert wide["moe_routing_combine_backward"] >= 3


@pytest.fixture(scope="module")
def gates():
    """What the compilers say of the kernels of ``gate``, by target."""
    return {target: found["cases"] for target, found in by_target(OF_GATE).items()}


@pytest.mark.parametrize("target", SHARED_MEMORY)
def test_the_kernels_of_gate_compile_without_spills_and_wait_first(gates, target):
    found = gates[target]
    assert {(case["kernel"], case["plans"]) for case in found} == {
        ("moe_routing_gate_sums", False), ("moe_routing_gate_sums", True),
        ("moe_routing_gate_route", False), ("moe_routing_gate_route", True),
        ("moe_routing_plan_place_counted", True),
    }  # fmt: skip
    assert not [case for case in found if case["spills"]]
    assert not [case for case in found if case["shared"] > SHARED_MEMORY[target]]
    waits = {"sm_80": "never", "gfx942": None, "gfx950": None}
    sums = [case for case in found if case["kernel"] == "moe_routing_gate_sums"]
    early = [case for case in found if case["reads_hidden"] and case not in sums]
    assert early
    assert {case.get("waits") for case in found if case not in early} == {
        waits.get(target, "first")
    }
    # These read hidden states, which the kernel before the previous one made. So the previous one
    # must not let them start before its own wait.
    assert {case.get("waits") for case in early} == {waits.get(target, "coherent")}
    starts = {"sm_80": "never", "gfx942": None, "gfx950": None}.get(target, "after")
    assert {case.get("starts") for case in sums if case["adds_slices"]} == {starts}


@pytest.mark.parametrize("target", SHARED_MEMORY)
def test_all_tiles_of_a_gate_multiply_by_one_shape_of_instruction(gates, target):
    by_problem = {}
    for case in gates[target]:
        if case["kernel"] == "moe_routing_gate_sums":
            by_problem.setdefault(case["problem"], []).append(tuple(case["matrix"]))
    assert by_problem
    for of_tiles in by_problem.values():
        assert len(set(of_tiles)) == 1
        assert len(of_tiles[0]) == 1


@pytest.fixture(scope="module")
def balances():
    """What the compilers say of the kernels of ``balance``, by target."""
    return {target: found["cases"] for target, found in by_target(OF_BALANCE).items()}


@pytest.mark.parametrize("target", SHARED_MEMORY)
def test_the_kernels_of_balance_compile_without_spills_and_wait_first(balances, target):
    found = balances[target]
    assert {case["kernel"] for case in found} == {
        "moe_routing_balance", "moe_routing_balance_backward",
    }  # fmt: skip
    assert not [case for case in found if case["spills"]]
    assert not [case for case in found if case["shared"] > SHARED_MEMORY[target]]
    waits = {"sm_80": "never", "gfx942": None, "gfx950": None}.get(target, "first")
    assert {case.get("waits") for case in found} == {waits}


@pytest.mark.parametrize("target", SHARED_MEMORY)
def test_whole_rows_of_logits_are_read_and_written_16_bytes_at_a_time(balances, target):
    for case in balances[target]:
        returns = case["kernel"].endswith("backward")
        assert case["wide"] >= (1 + returns) * (case["E"] not in {60, 61}), case
