"""The kernels of ``plan`` in Triton's interpreter."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest


def interpreted(*arguments):
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("interpreted_plan.py")), *arguments],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("cases", [7, pytest.param(42, marks=pytest.mark.slow)])
def test_every_kind_of_launch_makes_the_plan_of_the_definition(cases):
    interpreted("drawn", str(random.getrandbits(32)), str(cases))


@pytest.mark.slow
def test_ids_are_read_where_32_bits_do_not_count_the_places_between_them(tmp_path):
    interpreted("far", str(tmp_path / "ids"))
