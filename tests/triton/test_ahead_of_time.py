"""The kernels, compiled to machine code for GPUs that are not here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_MEMORY = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "sm_120": 101_376, "gfx942": 65_536, "gfx950": 163_840}


@pytest.mark.parametrize("target", SHARED_MEMORY)
def test_every_variant_compiles_without_spills_and_within_the_parts_shared_memory(target):
    script = Path(__file__).with_name("ahead_of_time.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script), target], check=False, capture_output=True, text=True, timeout=600, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) == 10
    assert not [case for case in found if case["spills"]]
    assert not [case for case in found if case["shared"] > SHARED_MEMORY[target]]
