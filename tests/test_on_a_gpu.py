"""The contract on the first CUDA device, in the smallest profile; `make test-gpu` runs this.

Without a GPU these tests are skipped, and `make test-gpu` fails.
"""

import json
import os
import random
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from mutants import MUTANTS, balancing, gating, permutation, planning, registered

from moe_routing.conformance import drawn, run
from moe_routing.conformance.contract import contract_of
from moe_routing.conformance.runner import backend_under_test, evaluate

KITS = list(
    product(("eager", "triton"), ("route", "plan", "permute", "combine", "gate", "balance"))
)
"""Backends and operations whose kits run."""


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "operation"), KITS)
def test_a_backend_conforms_on_the_gpu(backend, operation):
    report = run(backend, "cuda:0", operation=operation, profile="smoke")
    assert [(result.id, result.message) for result in report.failed] == []
    assert report.ok


@pytest.mark.gpu
def test_device_functions_do_what_they_say_when_they_are_compiled():
    script = Path(__file__).parent / "triton" / "device_functions.py"
    done = subprocess.run(
        [sys.executable, str(script), "gpu"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not any(json.loads(done.stdout)["wrong"].values())


EXAMPLE = Path(__file__).parents[1] / "examples" / "cuda_graph.py"


@pytest.mark.gpu
def test_the_example_of_a_cuda_graph_replays_the_bits_of_plain_calls():
    done = subprocess.run(
        [sys.executable, str(EXAMPLE)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    said = "{} tokens: same bits as a plain call: True, nonzero padding: 0"
    assert done.stdout.splitlines() == [said.format(3), said.format(64)]


def test_without_a_gpu_the_example_of_a_cuda_graph_says_what_it_needs():
    done = subprocess.run(
        [sys.executable, str(EXAMPLE)], check=False, capture_output=True, text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 1
    assert "expected a GPU that torch can use, found none" in done.stderr


def evaluated(backend, mutant):
    """Run the check that must catch a mutant, of a router on gemma4's cases.

    What needs much memory is in the profile "full" alone.
    """
    under_test = backend_under_test(backend, "cuda:0")
    contract = contract_of(mutant.operation)
    (check,) = (check for check in contract.checks if check.name == mutant.caught_by)
    for item in check.items("full" if mutant.only_on == "memory" else "smoke"):
        if getattr(item.case, "variant", "gemma4") == "gemma4":
            yield evaluate(item, under_test)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "mutant",
    [
        m
        for m in (
            *MUTANTS,
            *planning.MUTANTS,
            *permutation.MUTANTS,
            *balancing.MUTANTS,
            *gating.MUTANTS,
        )
        if m.only_on
    ],
    ids=lambda mutant: f"{mutant.name}-by-{mutant.caught_by}-{mutant.operation}",
)
def test_a_mutant_that_is_wrong_on_cuda_alone_is_caught_and_eager_is_not(mutant):
    if mutant.only_on == "two devices" and torch.cuda.device_count() == 1:
        pytest.skip("needs two devices")
    with drawn.seeded(random.getrandbits(32)):
        assert [
            result.message for result in evaluated("eager", mutant) if result.status != "passed"
        ] == []
        with registered(mutant) as name:
            said = [
                result.message for result in evaluated(name, mutant) if result.status == "failed"
            ]
    assert any(re.search(mutant.saying, message) for message in said), said


def without_a_gpu(*command):
    """Run a command in the project's root, in a process that sees no GPU on any machine."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(
        command,
        cwd=Path(__file__).parents[1],
        env=own | {"CUDA_VISIBLE_DEVICES": ""},
        check=False,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_without_a_gpu_a_test_that_needs_one_is_skipped_whatever_is_selected():
    marked = f"{__file__}::{test_a_backend_conforms_on_the_gpu.__name__}"
    done = without_a_gpu(
        sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not patch_mapping", marked
    )
    assert done.returncode == 0, done.stdout
    skipped = rf"SKIPPED \[{len(KITS)}\] .*: needs an NVIDIA GPU; torch sees none$"
    assert re.search(skipped, done.stdout, re.MULTILINE)
    assert re.search(rf"^=+ {len(KITS)} skipped in ", done.stdout, re.MULTILINE)


@pytest.mark.slow
def test_without_a_gpu_make_test_gpu_fails_and_says_why():
    python = Path(sys.executable).parent
    ready = "--assume-old=.venv/.ready"  # this environment, so none is set up
    done = without_a_gpu("make", "test-gpu", f"BIN={python}", ready)
    assert done.returncode == 2
    assert done.stderr.startswith("make test-gpu: torch sees no NVIDIA GPU\n")
    assert "test session starts" not in done.stdout
