"""Probing: this machine, recorded answers of other devices, and privateuse1.

A real process renames privateuse1.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moe_routing.probing import device_names, devices, probe
from moe_routing.probing._describe import describe
from moe_routing.probing._installed import Installed, Triton
from moe_routing.probing._intel import intel_arch
from moe_routing.probing._observe import Observation, TorchBuild, driver_version
from moe_routing.probing._toolchains import toolchains

RECORDED = sorted((Path(__file__).parent / "recorded_devices").glob("*.json"))
CPU_BUILD = TorchBuild(version="2.13.0+cpu")
CUDA_BUILD = TorchBuild(version="2.13.0", cuda="13.0")
XPU_BUILD = TorchBuild(version="2.8.0+xpu", xpu="20250101")
TRITON = Triton(version="3.7.1", backends=("amd", "nvidia"))


def fresh_process(script, path=None):
    """Run Python in a process of its own; return its stdout.

    ``path`` goes before everything else on sys.path.
    """
    here = [entry for entry in sys.path if entry]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(path), *here] if path else here)}
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def write_distribution(site, name, version, *, entry_points="", files=()):
    """Write what pip would leave of a distribution.

    That is metadata, entry points, files and their record.
    """
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(entry_points)
    digest = base64.urlsafe_b64encode(b"\0" * 32).decode().rstrip("=")
    (info / "RECORD").write_text(
        "".join(f"{file},sha256={digest},{len(text)}\n" for file, text in files)
    )
    for file, text in files:
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).write_text(text)


def write_triton(site, release, backends, library, *, announce=True):
    """Write a triton that must not be imported; ``release`` is its name and version."""
    name, version = release.split()
    files = [("triton/__init__.py", "raise OSError('triton must not be imported to find out')\n")]
    files += [(f"triton/backends/{backend}/driver.py", "") for backend in backends]
    files += [("triton/_C/libtriton.so", library)]
    points = (
        "[triton.backends]\n" + "".join(f"{b} = triton.backends.{b}\n" for b in backends)
        if announce
        else ""
    )
    write_distribution(site, name, version, entry_points=points, files=files)


def recorded(file):
    record = json.loads(file.read_text())
    properties = SimpleNamespace(**record["properties"])
    observation = Observation(
        type=record["type"],
        index=record["index"],
        properties=properties,
        build=TorchBuild(**record["torch"]),
        installed=Installed(triton=TRITON),
    )
    return record, describe(observation)


@pytest.mark.parametrize("file", RECORDED, ids=lambda file: file.stem)
def test_a_recorded_device_is_described_as_what_it_is(file):
    record, device = recorded(file)
    expected = record["expected"]
    assert (device.type, device.index, device.name) == (
        record["type"],
        record["index"],
        record["properties"]["name"],
    )
    assert (device.platform, device.arch) == (expected["platform"], expected["arch"])
    assert (device.compute_units, list(device.warp_sizes)) == (
        expected["compute_units"],
        expected["warp_sizes"],
    )
    assert device.capability == (tuple(expected["capability"]) if expected["capability"] else None)
    properties = record["properties"]
    assert device.total_memory == properties.get(
        "total_memory", properties.get("recommended_max_memory")
    )


@pytest.mark.parametrize(
    ("architecture", "device_id", "arch"),
    [
        (0x500400400, None, "bmg-g21"),
        (0x30F000700, None, "pvc"),
        (0x30DC00800, None, "acm-g10"),
        (0x500400400, 0x0BDA, "bmg-g21"),
        (0x9900000000000000, 0xE211, "bmg-g21"),
        (None, 0x0BD5, "pvc"),
        (0x9900000000000000, 0xFFFF, ""),
        (None, None, ""),
    ],
)
def test_an_intel_gpu_is_named_by_its_architecture_number_else_by_its_device_id(
    architecture, device_id, arch
):
    assert intel_arch(architecture, device_id) == arch


@pytest.mark.parametrize("file", RECORDED, ids=lambda file: file.stem)
def test_every_device_says_something_about_every_toolchain(file):
    _, device = recorded(file)
    assert [t.name for t in device.toolchains] == ["torch", "triton", "rocm", "xpu", "ipex"]


def test_triton_with_nvidia_and_amd_inside_serves_an_mi300x_but_no_arc():
    served = {file.stem: recorded(file)[1].toolchain("triton").usable for file in RECORDED}
    assert served["amd_mi300x"]
    assert not served["intel_arc_pro_b60"]
    assert not served["apple_m1_pro"]


def test_the_cpu_is_described_from_the_real_machine():
    cpu = probe("cpu")
    assert (cpu.type, cpu.index, cpu.platform) == ("cpu", None, "cpu")
    assert cpu.arch in {"x86_64", "aarch64"}
    assert cpu.total_memory > 2**28
    assert cpu.compute_units >= 1
    assert cpu.toolchain("torch").version == str(torch.__version__)


def test_the_meta_device_is_neither_cpu_nor_accelerator():
    meta = probe(torch.device("meta"))
    assert (meta.platform, meta.is_accelerator) == ("meta", False)


def test_a_cpu_tensor_on_index_0_is_the_same_cpu():
    assert probe(torch.device("cpu", 0)) is probe("cpu")


def test_the_devices_here_begin_with_the_cpu():
    assert device_names()[0] == "cpu"
    assert devices()[0] is probe("cpu")


@pytest.mark.parametrize("nonsense", [None, 0, b"cpu", torch.float32])
def test_something_that_is_no_device_is_a_type_error_that_shows_it(nonsense):
    with pytest.raises(TypeError, match=r"device: expected a torch\.device or a str") as caught:
        probe(nonsense)
    assert repr(nonsense) in str(caught.value)


@pytest.mark.parametrize("text", ["cuba", "", "cuda:-1", "cpu:x"])
def test_a_device_that_torch_does_not_know_is_a_value_error_that_lists_those_here(text):
    with pytest.raises(ValueError, match=r"device: expected a device that torch knows.*'cpu'"):
        probe(text)


@pytest.mark.parametrize("absent", ["cuda:99", "xpu:99"])
def test_a_device_that_is_not_on_this_machine_is_a_value_error(absent):
    with pytest.raises(ValueError, match=r"is not on this machine; torch .* sees cpu"):
        probe(absent)


ACME = """
import json, sys, threading, types
import moe_routing.probing
untouched = sorted({"torch", "triton"} & set(sys.modules))
import torch
torch.utils.rename_privateuse1_backend("acme")
nameless = moe_routing.probing.probe("acme:5")
class Acme(types.ModuleType):
    calls, current = [], 1
    def is_available(self): return True
    def device_count(self): return 40
    def current_device(self): return self.current
    def get_device_properties(self, index):
        self.calls.append(index)
        threading.Event().wait(0.05)
        return types.SimpleNamespace(
            name=f"Acme {index}", total_memory=2**30, multi_processor_count=7
        )
acme = Acme("torch.acme")
torch._register_device_module("acme", acme)
probe = moe_routing.probing.probe
gate, answers = threading.Barrier(32), []
def ask():
    gate.wait()
    answers.append(probe("acme:3"))
threads = [threading.Thread(target=ask) for _ in range(32)]
[t.start() for t in threads]; [t.join() for t in threads]
calls = list(acme.calls)
given = probe("acme:2").index
first = probe("acme").index
acme.current = 4
second = probe("acme").index
try:
    probe("acme:40")
except ValueError as error:
    absent = str(error)
names = [n for n in moe_routing.probing.device_names() if n.startswith(("cpu", "acme"))]
print(json.dumps({
    "untouched": untouched, "nameless": nameless.to_dict(), "calls": calls,
    "same": len({id(a) for a in answers}), "answer": answers[0].to_dict(), "given": given,
    "currents": [first, second], "absent": absent, "names": names[:3],
    "modules": sorted({"triton"} & set(sys.modules)),
}))
"""


@pytest.fixture(scope="module")
def acme(tmp_path_factory):
    """Answers of a process in which privateuse1 is called acme.

    triton and IPEX raise there when they are imported.
    """
    site = tmp_path_factory.mktemp("site")
    write_triton(site, "triton 3.7.1", ("amd", "nvidia"), "library")
    ipex = [("intel_extension_for_pytorch/__init__.py", "import os; os.exit(127)\n")]
    write_distribution(
        site, "intel-extension-for-pytorch", "2.7.0", files=ipex
    )  # fits no torch: 2.8 fits torch 2.8
    return json.loads(fresh_process(ACME, site))


@pytest.mark.slow
def test_importing_probing_imports_neither_torch_nor_triton(acme):
    assert acme["untouched"] == []


@pytest.mark.slow
def test_probing_reads_about_triton_and_ipex_without_importing_them(acme):
    found = {t["name"]: t for t in acme["answer"]["toolchains"]}
    assert acme["modules"] == []
    assert found["triton"]["version"] == "3.7.1"
    assert found["ipex"]["version"] == "2.7.0"
    assert not found["ipex"]["usable"]


def test_32_threads_probe_a_device_once_and_get_the_same_answer(acme):
    assert acme["calls"] == [3]
    assert acme["same"] == 1


def test_a_renamed_privateuse1_backend_is_its_own_platform(acme):
    answer = acme["answer"]
    assert (answer["type"], answer["platform"], answer["index"]) == ("acme", "acme", 3)
    assert (answer["name"], answer["total_memory"], answer["compute_units"]) == ("Acme 3", 2**30, 7)


def test_a_privateuse1_backend_without_a_module_is_still_described(acme):
    assert (acme["nameless"]["platform"], acme["nameless"]["index"], acme["nameless"]["name"]) == (
        "acme",
        5,
        "",
    )


def test_the_given_device_is_probed_and_not_the_current_one(acme):
    assert acme["given"] == 2


def test_a_device_without_an_index_is_the_one_that_is_current_at_that_moment(acme):
    assert acme["currents"] == [1, 4]


def test_an_index_that_is_not_there_is_refused_by_name(acme):
    assert "'acme:40' is not on this machine" in acme["absent"]


def test_a_privateuse1_backend_is_among_the_devices_here(acme):
    assert acme["names"] == ["cpu", "acme:0", "acme:1"]


def test_no_triton_on_the_path_is_none(tmp_path):
    assert Installed.read([str(tmp_path)]).triton is None


def test_a_stub_in_place_of_triton_or_a_finder_that_raises_is_no_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))  # has no __spec__
    assert Installed.read().triton is None
    monkeypatch.delitem(sys.modules, "triton")

    class Finder:
        @staticmethod
        def find_spec(*_arguments):
            raise SystemExit

    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    assert Installed.read().triton is None


def test_triton_is_read_from_the_files_that_are_there(tmp_path):
    write_triton(tmp_path, "triton 3.7.1", ("amd", "nvidia"), "library")
    assert Installed.read([str(tmp_path)]).triton == TRITON


def test_a_triton_before_the_entry_points_is_read_from_its_folders(tmp_path):
    write_triton(
        tmp_path, "triton-xpu 3.3.0b1", ("amd", "intel", "nvidia"), "library", announce=False
    )
    triton = Installed.read([str(tmp_path)]).triton
    assert (triton.distribution, triton.backends) == ("triton-xpu", ("amd", "intel", "nvidia"))


def test_a_triton_without_metadata_is_one_of_unknown_version(tmp_path):
    (tmp_path / "triton" / "backends" / "nvidia").mkdir(parents=True)
    (tmp_path / "triton" / "__init__.py").touch()
    (tmp_path / "triton" / "backends" / "nvidia" / "driver.py").touch()
    triton = Installed.read([str(tmp_path)]).triton
    assert triton == Triton(distribution="triton", version="", backends=("nvidia",))


@pytest.fixture
def overwritten(tmp_path):
    """``pip install triton`` over triton-xpu.

    The folder of triton-xpu's backend stays, and its compiled library does not.
    """
    write_triton(tmp_path, "triton-xpu 3.7.2", ("intel",), "the library of XPU")
    write_triton(tmp_path, "triton 3.7.1", ("amd", "nvidia"), "library")
    return Installed.read([str(tmp_path)])


def test_of_two_tritons_the_one_whose_library_is_on_disk_counts(overwritten):
    assert (overwritten.triton.distribution, overwritten.triton.version) == ("triton", "3.7.1")
    assert overwritten.triton.overwritten == ("triton-xpu 3.7.2",)


def test_a_backend_folder_that_an_overwritten_triton_left_behind_is_not_carried(overwritten):
    assert overwritten.triton.backends == ("amd", "nvidia")
    assert overwritten.triton.broken_by == ("intel",)


def test_a_triton_broken_by_an_overwritten_one_is_unusable_and_says_how_to_mend_it(overwritten):
    triton = toolchains("cuda", CUDA_BUILD, overwritten)[1]
    assert not triton.usable
    assert (
        triton.fix
        == "pip uninstall --yes triton triton-xpu && pip install --force-reinstall 'triton>=3.6'"
    )


def test_two_tritons_that_carry_the_same_backends_do_no_harm(tmp_path):
    write_triton(tmp_path, "triton 3.6.0", ("amd", "nvidia"), "library")
    write_triton(tmp_path, "pytorch-triton-rocm 3.6.0", ("amd", "nvidia"), "library of ROCm")
    installed = Installed.read([str(tmp_path)])
    assert installed.triton.distribution == "pytorch-triton-rocm"
    assert toolchains("rocm", TorchBuild(version="2.11.0", hip="7.1"), installed)[1].usable


@pytest.mark.parametrize(
    ("platform", "usable", "fix"),
    [
        ("cpu", True, ""),
        ("cuda", True, ""),
        ("rocm", True, ""),
        ("xpu", False, "uv pip install --reinstall torch --torch-backend=xpu"),
        ("mps", False, ""),
    ],
)
def test_triton_is_usable_where_it_carries_the_platforms_backend(platform, usable, fix):
    triton = toolchains(platform, CPU_BUILD, Installed(triton=TRITON))[1]
    assert (triton.usable, triton.fix) == (usable, fix)


@pytest.mark.parametrize(
    ("platform", "fix"), [("cuda", "pip install --force-reinstall 'triton>=3.6'"), ("cpu", "")]
)
def test_a_missing_triton_is_to_be_mended_only_where_it_is_needed(platform, fix):
    triton = toolchains(platform, CPU_BUILD, Installed())[1]
    assert (triton.version, triton.usable, triton.fix) == (None, False, fix)


@pytest.mark.parametrize(
    ("version", "usable", "remark"),
    [
        ("3.4.0", False, "too old"),
        ("3.6.0", True, ""),
        ("3.9.1", True, ""),
        ("3.10.0", True, "newer than 3.9"),
        ("", True, "unknown"),
    ],
)
def test_the_version_of_triton_is_held_against_the_supported_range(version, usable, remark):
    triton = toolchains(
        "cuda", CUDA_BUILD, Installed(triton=Triton(version=version, backends=("nvidia",)))
    )[1]
    assert triton.usable is usable
    assert remark in triton.detail


@pytest.mark.parametrize(
    ("version", "usable", "remark"),
    [("2.7.1", False, "too old"), ("2.8.0", True, ""), ("2.14.0.dev2026", True, "newer")],
)
def test_the_version_of_torch_is_held_against_the_supported_range(version, usable, remark):
    found = toolchains("cpu", TorchBuild(version=version), Installed())[0]
    assert found.usable is usable
    assert remark in found.detail
    assert bool(found.fix) is not usable


def test_without_torch_everything_that_needs_it_is_unusable_and_torch_has_a_fix():
    torch_, _, rocm, xpu, _ = toolchains("cpu", None, Installed())
    assert (torch_.version, torch_.usable, torch_.detail) == (None, False, "not installed")
    assert torch_.fix == "pip install --force-reinstall 'torch>=2.8'"
    assert not rocm.usable
    assert not xpu.usable


def test_a_torch_that_cannot_be_imported_is_installed_all_the_same(tmp_path):
    write_distribution(tmp_path, "torch", "2.13.0+cpu")
    found = toolchains("cpu", None, Installed.read([str(tmp_path)]))[0]
    assert (found.version, found.usable, found.detail) == (
        "2.13.0+cpu",
        False,
        "cannot be imported",
    )


@pytest.mark.parametrize(
    ("build", "kind"), [(CPU_BUILD, "cpu"), (CUDA_BUILD, "cuda"), (XPU_BUILD, "xpu")]
)
def test_a_build_of_torch_knows_what_it_was_built_for(build, kind):
    assert build.kind == kind


@pytest.mark.parametrize(
    ("version", "build", "platform", "usable", "why"),
    [
        ("2.8.10+xpu", XPU_BUILD, "xpu", True, "retired pair"),
        ("2.8.0", XPU_BUILD, "xpu", False, "build for the CPU"),
        ("2.8.0", TorchBuild(version="2.8.0+cpu"), "cpu", True, "retired pair"),
        ("2.8.0", CPU_BUILD, "cpu", False, "with torch 2.13.0+cpu: importing it raises"),
        ("2.7.0", XPU_BUILD, "cpu", False, "with torch 2.8.0+xpu"),
        ("2.8.0", None, "cpu", False, "cannot be imported"),
    ],
)
def test_ipex_is_usable_only_as_the_retired_pair_and_a_mismatch_is_explained(
    version, build, platform, usable, why
):
    ipex = toolchains(platform, build, Installed(ipex=version))[4]
    assert ipex.usable is usable
    assert why in ipex.detail
    assert ipex.fix == ("" if usable else "pip uninstall --yes intel-extension-for-pytorch")


@pytest.mark.parametrize(
    ("build", "file", "text", "version"),
    [
        (
            CUDA_BUILD,
            "proc/driver/nvidia/version",
            (
                "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  "
                "Sat Aug 19 01:15:15 UTC 2023\nGCC version: 12.2.0\n"
            ),
            "535.104.05",
        ),
        (
            CUDA_BUILD,
            "proc/driver/nvidia/version",
            (
                "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  "
                "Release Build  (builder@host)\n"
            ),
            "580.65.06",
        ),
        (CUDA_BUILD, "proc/driver/nvidia/version", "something else\n", ""),
        (CUDA_BUILD, "sys/module/amdgpu/version", "6.10.5\n", ""),
        (
            TorchBuild(version="2.13.0", hip="7.0"),
            "sys/module/amdgpu/version",
            "6.10.5\n",
            "6.10.5",
        ),
    ],
)
def test_the_drivers_version_is_read_off_the_running_drivers_file(
    tmp_path, build, file, text, version
):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(text)
    assert driver_version(build, tmp_path) == version


def test_an_intel_gpus_driver_is_what_torch_says():
    file = next(file for file in RECORDED if file.stem == "intel_max_1100")
    record, device = recorded(file)
    assert device.driver == record["properties"]["driver_version"]


def test_the_cpu_has_no_driver():
    assert probe("cpu").driver == ""
