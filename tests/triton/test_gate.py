"""The kernels of ``gate`` in Triton's interpreter."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest


def interpreted(check, times):
    """Run a check in a process of its own."""
    script = Path(__file__).with_name("interpreted_gate.py")
    done = subprocess.run(
        [sys.executable, str(script), str(random.getrandbits(32)), check, str(times)],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_logits_are_within_their_bound_and_routed_and_every_launch_has_the_same_bits():
    interpreted("gates", 8)


@pytest.mark.slow
def test_a_row_has_the_same_bits_in_any_batch_and_at_any_address():
    interpreted("has_the_same_bits_in_any_batch", 8)


@pytest.mark.slow
def test_the_kit_passes():
    interpreted("conforms", 1)


def test_a_factor_is_the_sum_of_its_parts():
    interpreted("parts_add_up", 2)
