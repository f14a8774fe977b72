"""The doctor with an Arc Pro B60 and the real packages of Intel, right and wrong.

``make xpu-check`` runs these tests.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SITE, OVERWRITTEN, IPEX = (os.environ[name] for name in ("XPU_SITE", "XPU_OVERWRITTEN", "XPU_IPEX"))


def doctor(site, device="intel_arc_pro_b60"):
    """Run doctor with the packages of a folder before all others."""
    paths = [site, str(ROOT), str(ROOT / "registry"), str(ROOT / "backends")]
    command = [
        sys.executable,
        str(HERE / "b60.py"),
        str(ROOT / f"tests/recorded_devices/{device}.json"),
        "--json",
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout)


def found(report, name):
    (check,) = [check for check in report["checks"] if check["name"] == name]
    return check["status"], check["summary"], check["fix"]


def test_a_b60_with_triton_xpu_routes_with_it():
    report = doctor(SITE)
    assert report["reports"]["xpu:0"]["winner"] == "triton-xpu"
    assert found(report, "triton")[0] == "ok"


def test_a_triton_that_overwrote_triton_xpu_is_named_with_the_command_that_mends_it():
    report = doctor(OVERWRITTEN)
    status, summary, fix = found(report, "triton")
    assert status == "warning"
    assert "carries amd, nvidia, not intel" in summary
    assert "triton 3.7.1 has overwritten triton-xpu 3.3.0b1" in summary
    assert fix == (
        "pip uninstall --yes triton triton-xpu && "
        "uv pip install --reinstall torch --torch-backend=xpu"
    )
    assert report["reports"]["xpu:0"]["winner"] == "torch-compile"


def test_pypis_ipex_beside_torchs_xpu_build_of_the_same_version_is_named_as_the_build_for_the_cpu():
    status, summary, fix = found(doctor(IPEX, "intel_max_1100"), "ipex")
    assert status == "warning"
    assert "is the build for the CPU" in summary
    assert fix == "pip uninstall --yes intel-extension-for-pytorch"


def test_ipex_beside_another_torch_is_named_and_really_raises_what_no_import_error_is():
    status, summary, fix = found(doctor(IPEX), "ipex")
    assert status == "warning"
    assert "2.8.0 with torch 2.13.0+xpu: importing it raises" in summary
    assert fix == "pip uninstall --yes intel-extension-for-pytorch"
    script = """
try:
    import intel_extension_for_pytorch
except ImportError:
    raise SystemExit("an ImportError")
except AttributeError as error:
    print(error)
"""
    environment = os.environ | {"PYTHONPATH": IPEX}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "exit" in done.stdout
