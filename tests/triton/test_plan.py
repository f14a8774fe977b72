"""The kernels of ``plan`` in Triton's interpreter."""

import os
import random
import subprocess
import sys
from pathlib import Path


def test_every_kind_of_launch_makes_the_plan_of_the_definition():
    script = Path(__file__).with_name("interpreted_plan.py")
    done = subprocess.run(
        [sys.executable, str(script), str(random.getrandbits(32))],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
