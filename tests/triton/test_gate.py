"""The kernels of ``gate`` in Triton's interpreter."""

import random
from pathlib import Path

import pytest
from scripts import printed

SCRIPT = Path(__file__).with_name("interpreted_gate.py")


def interpreted(check, times):
    """Run a check in a process of its own."""
    printed(SCRIPT, str(random.getrandbits(32)), check, str(times))


@pytest.mark.slow
def test_logits_are_within_their_bound_and_routed_and_every_launch_has_the_same_bits():
    interpreted("gates", 8)


@pytest.mark.slow
def test_a_row_has_the_same_bits_in_any_batch_and_at_any_address():
    interpreted("has_the_same_bits_in_any_batch", 8)


@pytest.mark.slow
def test_long_rows_have_the_same_bits_from_every_launch():
    interpreted("long_rows_have_the_same_bits_from_every_launch", 1)


@pytest.mark.slow
def test_a_plan_of_what_is_gated_is_that_of_its_ids():
    interpreted("plans", 16)


@pytest.mark.slow
def test_the_kit_passes():
    interpreted("conforms", 1)


def test_a_factor_is_the_sum_of_its_parts():
    interpreted("parts_add_up", 2)
