"""The kernels of ``balance`` in Triton's interpreter."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest


def interpreted(check, times):
    """Run a check in a process of its own."""
    script = Path(__file__).with_name("interpreted_balance.py")
    done = subprocess.run(
        [sys.executable, str(script), str(random.getrandbits(32)), check, str(times)],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("times", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_sums_counts_and_gradients_are_what_the_formulas_say(times):
    interpreted("sums_and_gradients", times)


def test_nan_reaches_every_sum_of_its_batch_and_no_other():
    interpreted("nan_reaches_every_sum_of_its_batch", 1)


def test_any_number_of_programs_and_launches_leaves_the_same():
    interpreted("many_programs_and_few_leave_the_same", 1)


@pytest.mark.slow
def test_the_kernels_conform():
    interpreted("conforms", 1)
