"""The contract on the first CUDA device, in the smallest profile; `make test-gpu` runs this."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moe_routing.conformance import run


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_a_backend_conforms_on_the_gpu(backend):
    report = run(backend, "cuda:0", profile="smoke")
    assert [(result.id, result.message) for result in report.failed] == []
    assert report.ok


@pytest.mark.gpu
def test_device_functions_do_what_they_say_when_they_are_compiled():
    script = Path(__file__).parent / "triton" / "device_functions.py"
    done = subprocess.run([sys.executable, str(script), "gpu"], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not any(json.loads(done.stdout)["wrong"].values())
