"""The device functions that kernels share, each alone, in Triton's interpreter.

``tests/test_on_a_gpu.py`` compiles them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("device_functions.py")


@pytest.fixture(scope="module")
def found():
    """What is wrong, by group, and how many units in the last place each function is off."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], check=False, capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "group", ["network", "exact16", "float32", "pair", "round", "maths", "sum"]
)
def test_device_functions_do_what_they_say(found, group):
    assert found["wrong"][group] == []


def test_every_group_is_asked_for(found):
    assert set(found["wrong"]) == {"network", "exact16", "float32", "pair", "round", "maths", "sum"}
