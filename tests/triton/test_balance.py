"""The kernels of ``balance`` in Triton's interpreter."""

import random
from pathlib import Path

import pytest
from scripts import printed

SCRIPT = Path(__file__).with_name("interpreted_balance.py")


def interpreted(check, times):
    """Run a check in a process of its own."""
    printed(SCRIPT, str(random.getrandbits(32)), check, str(times))


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
