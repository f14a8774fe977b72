"""The kernels of the backend ``symmetric``, compiled for GPUs that are not here."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("ahead_of_time_symmetric.py")
TARGETS = ("sm_80", "sm_90")
SEND, SEND_BACK, SUM_BACK = "moe_routing_send", "moe_routing_send_back", "moe_routing_sum_back"
PROCESSORS = {"sm_80": 108, "sm_90": 132}
REGISTERS = 65_536
"""Of a multiprocessor; a warp gets them by 256, a thread by 8."""
FRAME, TOUCHES = 8, 4
"""Bytes that a kernel of odd rows may lay aside, and the instructions that touch them.

ptxas lays a number or some flags aside before the loop over a program's items, so that one more
program fits on a multiprocessor.
"""
WARP = 32
WAIT = ["gpu.relaxed.max.s64"] * 6 + ["sys.acquire.add.u64"]
"""The atomics of a wait: two for each of three looks at the clock, and one at signals."""
SIGNALS = ["sys.release.add.u64", "sys.release.exch.b64"]
ADDS, EXCHANGES = SIGNALS
FLAG = "sys.relaxed.exch.b64"


def compiled(*arguments):
    """Return what a process found."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def by_target():
    """What the compilers say of every case, by target."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(TARGETS, pool.map(compiled, TARGETS), strict=True))


def must_copy_vectors(case):
    """Require that as much of a row is copied 16 bytes at a time as a program's threads allow.

    Of a short row each thread has less. The rows of a group are copied one after another.
    """
    of_row = case["WIDTH"] // (case["VEC"] * case["num_warps"] * WARP) if case["VEC"] > 1 else 0
    of_rows = of_row * case.get("GROUP", 1)
    assert case["wide loads"] == of_rows, case
    # Experts of places are written likewise.
    assert case["wide stores"] >= of_rows, case
    assert case["wide stores"] == of_rows or case.get("TELLS"), case


def must_signal_and_wait(case):
    """Require both signals and both waits, in orders that hold between GPUs."""
    flag = [FLAG] if case.get("PLACED") else []  # with the signals, which are released after it
    assert case["atomics"] == sorted(WAIT * 2 + SIGNALS + flag), case
    assert case["barrier"], case
    # Each wait ends: it looks at a clock, and has an instruction that stops the kernel.
    assert case["traps"] == 2, case
    assert case["clocks"] == 6, case


def must_round_products(case):
    """Require sums as ``moe_routing.combine`` makes them, whatever its backend, to the bit."""
    assert not case["fused"], case


def at_once(case):
    """Return how many programs a GPU runs at once, by their registers."""
    of_a_thread = -(-case["registers"] // 8) * 8
    of_a_program = of_a_thread * WARP * case["num_warps"]
    return REGISTERS // of_a_program * PROCESSORS[case["target"]]


def test_rows_of_whole_vectors_are_copied_16_bytes_at_a_time_and_signalled_to_other_gpus():
    found = compiled("sm_90", "--few")
    assert [case["kernel"] for case in found["cases"]] == [SEND, SEND_BACK, SUM_BACK]
    for case in found["cases"]:
        assert not case["spills"], case
        assert case["VEC"] > 1
        assert case["wide loads"]
        must_copy_vectors(case)
        must_signal_and_wait(case)
        must_round_products(case)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_variant_that_is_launched_is_compiled(by_target, target):
    cases = by_target[target]["cases"]

    def variants(kernel, *names):
        return {tuple(c[name] for name in names) for c in cases if c["kernel"] == kernel}

    # SUMS, TELLS, BY_PLACE, WEIGHS, KEEPS: with sums, weights come along, and both may be kept.
    tells, sums = (False, True, False, False, False), (True, True, False, True, False)
    sent = {
        tells, sums, (*sums[:4], True),
        (False, False, True, False, False), (True, False, True, False, False),
    }  # fmt: skip
    assert variants(SEND, "SUMS", "TELLS", "BY_PLACE", "WEIGHS", "KEEPS") == sent
    assert variants(SEND, "SUMS", "PLACED") == set(product((False, True), repeat=2))
    # Rows in the order of a plan are summed before they go back, where there are sums.
    assert variants(SEND_BACK, "BY_RANK", "PLANNED") == set(product((False, True), repeat=2))
    assert variants(SEND_BACK, "PLANNED", "GROUP") == set(product((False, True), (1, 2, 4, 8)))
    # Results are of 2 bytes or more.
    units = {("int32", 4), ("int32", 1), ("int16", 1)}
    assert variants(SEND, "unit", "VEC") == {*units, ("int8", 1)}
    assert variants(SEND_BACK, "unit", "VEC") == units
    dtypes = {"bfloat16": 8, "float16": 8, "float32": 4}
    of_sums = variants(SUM_BACK, "unit", "VEC", "weights")
    assert {made for made in of_sums if made[1] > 1} == {
        (dtype, vector, weights)
        for (dtype, vector), weights in product(dtypes.items(), ("bfloat16", "float32"))
    }
    assert {dtype for dtype, vector, _ in of_sums if vector == 1} == set(dtypes)
    for kernel in (SEND, SEND_BACK, SUM_BACK):
        assert variants(kernel, "RANKS", "LANES") == {(2, 2), (3, 4), (4, 4), (8, 8)}
        ranks = variants(kernel, "RANKS", "VEC")
        assert {(number, vector > 1) for number, vector in ranks} == set(
            product((2, 3, 4, 8), (False, True))
        )
    assert not [case for case in cases if case["INTERPRETED"]]


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_spilled_and_all_programs_run_at_once(by_target, target):
    found = by_target[target]
    assert not [case for case in found["cases"] if case["spills"] and case["VEC"] > 1]
    assert not [case for case in found["cases"] if case["frame"] > FRAME]
    assert not [case for case in found["cases"] if case["spills"] > TOUCHES]
    assert not [case for case in found["cases"] if at_once(case) < case["programs"]]


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_a_row_is_copied_by_vectors_where_it_consists_of_them(by_target, target):
    for case in by_target[target]["cases"]:
        must_copy_vectors(case)
    for kernel in (SEND, SEND_BACK, SUM_BACK):
        assert [
            case
            for case in by_target[target]["cases"]
            if case["kernel"] == kernel and case["wide loads"] and case["wide stores"]
        ]


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_signals_hold_between_gpus_and_every_wait_ends(by_target, target):
    for case in by_target[target]["cases"]:
        must_signal_and_wait(case)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "when", "early"), [("sm_80", "never", 0), ("sm_90", "first", 1)]
)
def test_a_kernel_that_may_start_early_waits_before_it_touches_memory(
    by_target, target, when, early
):
    cases = by_target[target]["cases"]
    assert {case["waits"] for case in cases if "waits" in case} == {when}
    assert {case["kernel"] for case in cases if "waits" in case} == {SEND, SEND_BACK, SUM_BACK}
    assert {case["PDL"] for case in cases} == {bool(early)}
    assert {case.get("launch_pdl", False) for case in cases} == {bool(early)}
    # Each kernel waits for the one before, and lets the next one start, once.
    assert {tuple(case["dependencies"]) for case in cases} == {(early, early)}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_a_weighted_row_is_rounded_before_it_is_added(by_target, target):
    for case in by_target[target]["cases"]:
        must_round_products(case)
