"""The kernels of ``permute`` and ``combine`` in Triton's interpreter."""

import random
from pathlib import Path

import pytest
from scripts import printed

SCRIPT = Path(__file__).with_name("interpreted_permutation.py")


def interpreted(check, times):
    """Run a check in a process of its own."""
    printed(SCRIPT, str(random.getrandbits(32)), check, str(times))


@pytest.mark.parametrize("times", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_rows_are_moved_and_added_to_the_bit_as_the_formulas_say(times):
    interpreted("permutes_and_combines", times)


def test_every_rounding_to_float8_is_torchs():
    interpreted("rounds_to_float8", 1)


def test_nothing_is_written_next_to_the_results_whatever_a_plan_holds():
    interpreted("trusts_no_plan", 1)


def test_the_gradient_of_a_weight_has_the_same_bits_in_any_batch_and_at_any_address():
    interpreted("sums_are_the_same_for_any_batch", 1)


def test_more_tokens_than_a_launch_has_programs_take_several():
    interpreted("in_several_launches", 1)
