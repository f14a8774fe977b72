"""The kernels, compiled for an Arc Pro B60 by the real Triton-XPU; ``make xpu-check`` runs this."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SITE = os.environ["XPU_SITE"]
"""Where Triton-XPU is installed, and nothing else."""


@pytest.fixture(scope="session")
def plans(environment):
    """What comes of the kernels of ``plan``."""
    return compiled_by("plan.py", environment)


@pytest.fixture(scope="session")
def permutations(environment):
    """What comes of the kernels of ``permute`` and ``combine``."""
    return compiled_by("permutation.py", environment)


@pytest.fixture(scope="session")
def balances(environment):
    """What comes of the kernels of ``balance``."""
    return compiled_by("balance.py", environment)


def compiled_by(script, environment):
    """Run a script in the environment, and return its cases."""
    command = [sys.executable, str(HERE / script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)["cases"]


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """Of a process whose ``triton`` is Triton-XPU."""
    assert shutil.which("spirv-val"), (
        "spirv-val is not installed: apt-get install --yes spirv-tools"
    )
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([SITE, sysconfig.get_path("purelib")]),
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        "TRITON_DISABLE_LINE_INFO": "1",
    }
    environment.pop("TRITON_INTERPRET", None)
    return environment


@pytest.fixture(scope="session")
def compiled(environment):
    processes = os.cpu_count() or 1

    def part(first):
        command = [sys.executable, str(HERE / "spirv.py"), str(first), str(processes)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        said = json.loads(done.stdout)
        assert said["triton"] == "3.3.0b1"
        return said["cases"]

    with ThreadPoolExecutor(processes) as pool:
        found = [case for cases in pool.map(part, range(processes)) for case in cases]
    for case in sorted(found, key=lambda case: list(map(str, case.values()))):
        print(*case.values())  # noqa: T201 -- the table of docs/backends.md
    return found


def test_every_launch_compiles_at_sub_groups_of_16_and_of_32_lanes(compiled):
    assert {case["sub_group"] for case in compiled} == {16, 32}
    assert {case["kernel"].split()[0] for case in compiled} >= {
        "cooperative",
        "thread_per_row",
        "backward",
    }


def test_spirv_val_takes_every_module(compiled):
    assert not [case for case in compiled if case["invalid"]]


def test_what_ships_spills_no_register_on_a_data_center_max(compiled):
    if shutil.which("ocloc") is None:
        pytest.skip(
            "Intel's offline compiler is not installed: apt-get install --yes intel-opencl-icd"
        )
    assert not [case for case in compiled if case["ships"] and case["spills"]]


def test_what_ships_fits_into_the_local_memory_of_an_xe_core(compiled):
    assert not [case for case in compiled if case["shared"] > 131_072]


FEW_SPILLS = 4
"""Of the one launch for few pairs."""


def test_the_kernels_of_plan_compile_and_hardly_spill(plans):
    assert {case["kernel"] for case in plans} == {
        "moe_routing_plan",
        "moe_routing_plan_count",
        "moe_routing_plan_scan",
        "moe_routing_plan_place",
    }
    assert not [case for case in plans if case["invalid"] or case["shared"] > 131_072]
    assert not [case for case in plans if case.get("spills", 0) > FEW_SPILLS]


def test_the_kernels_of_permute_and_combine_compile_without_spills(permutations):
    assert {case["kernel"] for case in permutations} == {
        "moe_routing_permute",
        "moe_routing_permute_quantized",
        "moe_routing_combine",
        "moe_routing_combine_backward",
    }
    assert not [case for case in permutations if case["invalid"] or case["shared"] > 131_072]
    assert not [case for case in permutations if case.get("spills", 0)]


def test_the_kernels_of_balance_compile_without_spills(balances):
    assert {case["kernel"] for case in balances} == {
        "moe_routing_balance",
        "moe_routing_balance_backward",
    }
    assert not [case for case in balances if case["invalid"] or case["shared"] > 131_072]
    assert not [case for case in balances if case.get("spills", 0)]


def test_the_kernel_that_counts_slots_compiles_without_spills(environment):
    cases = compiled_by("counts.py", environment)
    assert [case["E"] for case in cases] == [128, 128, 512] * len({c["slots"] for c in cases})
    assert not [case for case in cases if case["invalid"] or case["shared"] > 131_072]
    assert not [case for case in cases if case.get("spills", 0)]
