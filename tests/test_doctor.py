"""The doctor on machines that are broken in many ways, and on recorded devices.

Each machine is a real process.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from moe_routing.cli._render_doctor import render
from moe_routing.doctor import CHECKS, SCHEMA_VERSION, _checks, examine
from moe_routing.doctor._case import Case
from moe_routing.doctor._environment import HIDING, variables
from moe_routing.doctor._machine import Machine, gpus_without_torch
from moe_routing.probing._describe import describe
from moe_routing.probing._installed import Installed, Triton
from moe_routing.probing._observe import Observation, TorchBuild
from moe_routing_registry import BackendSpec, Target

ROOT = Path(__file__).parents[1]
SOURCES = [str(ROOT), str(ROOT / "registry"), str(ROOT / "backends")]
OURS = dict.fromkeys(
    ("MOE_ROUTING_BACKEND", "MOE_ROUTING_BLOCK", "MOE_ROUTING_STRICT", "COLUMNS"), ""
)


def doctor(*arguments, path=(), flags=(), **environment):
    """Run the doctor in a process of its own, with ``path`` before everything else on sys.path."""
    inherited = {name: value for name, value in os.environ.items() if name not in OURS}
    inherited |= {
        "PYTHONPATH": os.pathsep.join([*map(str, path), *SOURCES]),
        "PYTHONIOENCODING": "utf-8",
    }
    command = [sys.executable, *flags, "-m", "moe_routing", "doctor", *arguments]
    return subprocess.run(
        command, env=inherited | environment, capture_output=True, text=True, check=False
    )


def found(report, name):
    """Return the findings of the check of that name."""
    return [check for check in report["checks"] if check["name"] == name]


def write(site, file, text):
    (site / file).parent.mkdir(parents=True, exist_ok=True)
    (site / file).write_text(text)


def write_distribution(site, name, version, entry_points=""):
    """Write the metadata that pip would leave."""
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    write(site, f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    write(site, f"{info}/entry_points.txt", entry_points)


PLUGIN = """
import time
from moe_routing_registry import BackendSpec, Target, hookimpl
print("a plug-in that prints at import")

def supports(problem, device):
    raise ZeroDivisionError("its rule divides by zero")

@hookimpl
def moe_routing_backends():
    factories = {"route": "shaky:build"}
    return [
        BackendSpec(name="shaky", factories=factories, targets=(Target("*"),), priority=98,
                    supports=supports),
        BackendSpec(name="warp", factories=factories, targets=(Target("cuda"),), priority=99,
                    requirements=("warpcore>=3",)),
    ]
"""


@pytest.fixture(scope="module")
def troubled(tmp_path_factory):
    """The folder of packages of a machine in trouble, whose torch is healthy.

    IPEX fits no torch and raises at import, one plug-in raises, and the support rule of another
    raises.
    """
    site = tmp_path_factory.mktemp("troubled")
    write(site, "intel_extension_for_pytorch/__init__.py", "import os; os.exit(127)\n")
    write_distribution(site, "intel-extension-for-pytorch", "2.7.0")
    write(site, "exploding.py", "def deep():\n    raise RuntimeError('no fuel')\ndeep()\n")
    write_distribution(
        site, "moe-exploding", "1.2.3", "[moe_routing.backends]\nexploding = exploding\n"
    )
    write(site, "shaky.py", PLUGIN)
    write_distribution(site, "moe-shaky", "0.1", "[moe_routing.backends]\nshaky = shaky\n")
    return site


@pytest.fixture(scope="module")
def troubled_json(troubled):
    run = doctor("--json", path=[troubled])
    return run.returncode, json.loads(run.stdout)


@pytest.fixture(scope="module")
def troubled_text(troubled_json):
    """The same report as a terminal of 80 columns shows it."""
    shown = io.StringIO()
    render(troubled_json[1], Console(file=shown, width=80), verbose=True)
    return shown.getvalue()


def test_what_is_only_a_pity_leaves_exit_code_0(troubled_json):
    code, report = troubled_json
    assert (code, report["ok"]) == (0, True)


def test_a_plug_in_that_raises_at_import_is_reported_with_its_traceback(troubled_json):
    _, report = troubled_json
    (failure,) = report["plugin_failures"]
    assert (failure["name"], failure["distribution"], failure["code"]) == (
        "exploding",
        "moe-exploding 1.2.3",
        "import_failed",
    )
    assert "in deep" in failure["traceback"]
    assert "RuntimeError: no fuel" in failure["traceback"]


def test_a_plug_in_that_raises_costs_only_itself(troubled_json):
    _, report = troubled_json
    assert report["reports"]["cpu"]["winner"] == "eager"


def test_a_plug_in_that_raises_comes_with_the_command_that_mends_it(troubled_json):
    _, report = troubled_json
    (check,) = found(report, "plugins")
    assert (check["status"], check["fix"]) == ("warning", "pip uninstall moe-exploding")


def test_a_support_rule_that_raises_is_a_rejection_with_its_code(troubled_json):
    _, report = troubled_json
    states = {backend["name"]: backend["devices"]["cpu"] for backend in report["backends"]}
    assert (states["shaky"]["state"], states["shaky"]["code"]) == (
        "rejected",
        "support_rule_failed",
    )
    assert "its rule divides by zero" in states["shaky"]["reason"]


def test_a_backend_that_was_missed_is_a_warning(troubled_json):
    _, report = troubled_json
    (check,) = found(report, "backend")
    assert check["status"] == "warning"
    assert "with eager, not with shaky" in check["summary"]


def test_backends_are_listed_best_first_with_who_brought_them(troubled_json):
    _, report = troubled_json
    priorities = [backend["priority"] for backend in report["backends"]]
    brought = {backend["name"]: backend["distribution"] for backend in report["backends"]}
    assert priorities == sorted(priorities, reverse=True)
    assert (brought["warp"], brought["shaky"]) == ("moe-shaky 0.1", "moe-shaky 0.1")


def test_an_ipex_that_does_not_fit_is_explained_and_never_imported(troubled_json):
    _, report = troubled_json
    (check,) = found(report, "ipex")
    assert check["status"] == "warning"
    assert "importing it raises" in check["summary"]
    assert check["fix"] == "pip uninstall --yes intel-extension-for-pytorch"


def test_the_report_names_its_schema_and_every_check(troubled_json):
    _, report = troubled_json
    assert report["schema_version"] == SCHEMA_VERSION
    assert [name for name in CHECKS if found(report, name)] == list(CHECKS)


def test_verbose_shows_the_traceback_of_a_plug_in(troubled_text):
    assert "RuntimeError: no fuel" in troubled_text
    assert "in deep" in troubled_text


def test_the_mending_command_is_on_the_line_after_its_check(troubled_text):
    lines = troubled_text.splitlines()
    command = lines.index("    pip uninstall moe-exploding")
    assert any(line.startswith("[!] plugins:") for line in lines[command - 3 : command])


def test_at_80_columns_codes_and_names_stay_whole(troubled_text):
    assert "support_rule_failed" in troubled_text
    assert "platform" in troubled_text
    assert max(len(line) for line in troubled_text.partition("Checks")[0].splitlines()) <= 80


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory):
    """Every installed package but torch, for a Python that is told to look nowhere else."""
    site = tmp_path_factory.mktemp("without_torch")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if entry.name.partition("-")[0] not in {"torch", "torchgen", "functorch"}:
            (site / entry.name).symlink_to(entry)
    return site


def test_it_survives_a_missing_torch(without_torch):
    run = doctor("--json", path=[without_torch], flags=["-S"])
    report = json.loads(run.stdout)
    (check,) = found(report, "torch")
    assert run.returncode == 1
    assert (check["status"], check["summary"]) == ("problem", "torch is not installed")
    assert check["fix"] == "pip install --force-reinstall 'torch>=2.8'"


@pytest.mark.slow
def test_without_torch_it_still_lists_backends(without_torch):
    run = doctor(path=[without_torch], flags=["-S"])
    assert run.returncode == 1
    assert "plain PyTorch operations, on any device" in run.stdout
    assert "Traceback" not in run.stdout + run.stderr


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (
            "raise OSError('libtorch_cpu.so: cannot open shared object file')",
            "OSError: libtorch_cpu.so: cannot open shared",
        ),
        ("raise SystemExit('no licence')", "no licence"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "kills the process with SIGILL"),
        ("__version__ = '2.13.0'", "torch"),
        ("", "torch"),
    ],
    ids=["raises", "exits", "dies", "stub", "hollow"],
)
def test_it_survives_a_broken_torch(tmp_path, module, said):
    write(tmp_path, "torch/__init__.py", module + "\n")
    run = doctor("--json", path=[tmp_path])
    assert run.returncode == 1, run.stderr
    (check,) = found(json.loads(run.stdout), "torch")
    assert check["status"] == "problem"
    assert said in check["summary"]


@pytest.mark.slow
def test_it_survives_a_torch_of_which_only_an_empty_folder_is_left(without_torch, tmp_path):
    (tmp_path / "torch" / "lib").mkdir(parents=True)
    run = doctor("--json", path=[tmp_path, without_torch], flags=["-S"])
    (check,) = found(json.loads(run.stdout), "torch")
    assert (run.returncode, check["status"]) == (1, "problem")


@pytest.mark.slow
def test_a_backend_extension_that_breaks_torch_is_named_as_the_culprit(tmp_path):
    write(tmp_path, "intel_extension_for_pytorch/__init__.py", "import os; os.exit(127)\n")
    points = "[torch.backends]\nipex = intel_extension_for_pytorch:_autoload\n"
    write_distribution(tmp_path, "intel-extension-for-pytorch", "2.8.0", points)
    run = doctor("--json", "--check", "torch", path=[tmp_path])
    (check,) = json.loads(run.stdout)["checks"]
    assert (run.returncode, check["status"]) == (1, "problem")
    assert check["fix"] == "pip uninstall --yes intel-extension-for-pytorch"


def test_a_device_that_is_not_here_is_a_problem_in_plain_words():
    report = examine(device="cuda:77")
    (check,) = found(report, "devices")
    assert not report["ok"]
    assert check["summary"].startswith("device: 'cuda:77' is not on this machine")


def test_a_check_that_raises_is_itself_a_finding(monkeypatch):
    def broken(_case):
        raise ZeroDivisionError

    monkeypatch.setitem(CHECKS, "ipex", broken)
    (check,) = found(examine(device="cpu", checks=["ipex"]), "ipex")
    assert (check["status"], check["summary"]) == (
        "problem",
        "this check itself raised ZeroDivisionError",
    )


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("MOE_ROUTING_BACKEND", "eagre", "did you mean 'eager'?"),
        ("MOE_ROUTING_BLOCK", "eager, trition", "unknown backend in MOE_ROUTING_BLOCK 'trition'"),
        ("MOE_ROUTING_STRICT", "maybe", "expected 1 or 0, got 'maybe'"),
        ("MOE_ROUTING_BACKENDS", "eager", "did you mean 'MOE_ROUTING_BACKEND'"),
    ],
)
def test_a_wrong_environment_variable_is_a_problem_that_says_what_was_expected(
    monkeypatch, name, value, said
):
    monkeypatch.setenv(name, value)
    report = examine(device="cpu", checks=["environment"])
    (check,) = report["checks"]
    assert (check["status"], check["fix"]) == ("problem", f"unset {name}")
    assert said in check["summary"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("MOE_ROUTING_BACKEND", " eager "), ("MOE_ROUTING_BLOCK", ""), ("MOE_ROUTING_STRICT", "0")],
)
def test_a_right_environment_variable_is_listed_and_no_problem(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    (variable,) = [v for v in variables(["eager"]) if v.name == name]
    assert (variable.value, variable.problem) == (value, "")


def test_other_peoples_variables_that_hide_devices_are_listed(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert ("CUDA_VISIBLE_DEVICES", "3") in [(v.name, v.value) for v in variables(["eager"])]


def test_a_block_that_leaves_no_backend_is_a_problem(monkeypatch):
    from moe_routing import list_backends

    monkeypatch.setenv("MOE_ROUTING_BLOCK", ",".join(list_backends()))
    report = examine(device="cpu", checks=["backend"])
    assert not report["ok"]
    assert report["checks"][0]["summary"] == "cpu: no backend fits"


def machine(*files, build, triton=None):
    """A machine with recorded devices."""
    infos = []
    for file in files:
        record = json.loads(
            (Path(__file__).parent / "recorded_devices" / f"{file}.json").read_text()
        )
        seen = Observation(
            type=record["type"],
            index=record["index"],
            properties=SimpleNamespace(**record["properties"]),
            build=build,
            installed=Installed(triton=triton),
        )
        infos.append(describe(seen))
    return Machine(
        build=build,
        torch_failure=None,
        installed=Installed(triton=triton),
        devices=tuple(infos),
        device_failures={},
        remarks=(),
    )


def case(here, **changes):
    given = {
        "device": None,
        "router": "gemma4",
        "verify": False,
        "backends": {},
        "distributions": {},
        "failures": (),
    }
    return Case(
        machine=here,
        **given,
        duplicates=(),
        reports={},
        operations={},
        others={},
        choosing_failure=None,
        **changes,
    )


CUDA = TorchBuild(version="2.13.0", cuda="13.0")
XPU = TorchBuild(version="2.13.0+xpu", xpu="20250302")


def test_a_missing_triton_on_an_nvidia_gpu_is_a_warning_with_its_command():
    (check,) = _checks.triton(case(machine("nvidia_h200", build=CUDA)))
    assert (check.status, check.summary) == ("warning", "triton for cuda: not installed")
    assert check.fix == "pip install --force-reinstall 'triton>=3.6'"


def test_nvidias_triton_on_an_intel_gpu_is_a_warning_that_says_what_it_lacks():
    triton = Triton(version="3.7.1", backends=("amd", "nvidia"))
    (check,) = _checks.triton(case(machine("intel_arc_pro_b60", build=XPU, triton=triton)))
    assert (check.status, check.fix) == (
        "warning",
        "uv pip install --reinstall torch --torch-backend=xpu",
    )
    assert "carries amd, nvidia, not intel" in check.summary


def test_two_cards_of_a_kind_need_one_line_about_triton():
    triton = Triton(version="3.7.1", backends=("amd", "nvidia"))
    checks = _checks.triton(
        case(machine("nvidia_h200", "nvidia_a100_80gb_pcie", build=CUDA, triton=triton))
    )
    assert [check.status for check in checks] == ["ok"]


def test_a_runtime_that_no_device_needs_is_skipped():
    here = machine("nvidia_h200", build=CUDA)
    assert [check.status for check in (*_checks.rocm(case(here)), *_checks.xpu(case(here)))] == [
        "skipped",
        "skipped",
    ]


def test_torchs_own_xpu_is_found_for_an_intel_gpu():
    (check,) = _checks.xpu(case(machine("intel_arc_pro_b60", build=XPU)))
    assert (check.status, check.summary) == ("ok", "xpu 20250302 for xpu: in torch")


def test_the_first_accelerator_is_the_main_device():
    assert machine("nvidia_a100_80gb_pcie", build=CUDA).main_device.name == "NVIDIA A100 80GB PCIe"


def test_gpus_that_torch_does_not_see_are_found_in_the_files_of_the_system(tmp_path):
    write(tmp_path, "proc/driver/nvidia/version", "NVRM version")
    write(tmp_path, "dev/kfd", "")
    for card, (vendor, device) in {
        "card0": ("0x1a03", "0x2000"),
        "card1": ("0x8086", "0xe211"),
    }.items():
        write(tmp_path, f"sys/class/drm/{card}/device/vendor", f"{vendor}\n")
        write(tmp_path, f"sys/class/drm/{card}/device/device", f"{device}\n")
    assert [vendor for vendor, _ in gpus_without_torch(tmp_path)] == ["NVIDIA", "AMD", "Intel"]


@pytest.mark.parametrize(
    ("build", "hidden", "said", "fix"),
    [
        (
            TorchBuild(version="2.13.0+cpu"),
            {},
            "",
            "uv pip install --reinstall torch --torch-backend=auto",
        ),
        (
            CUDA,
            {"CUDA_VISIBLE_DEVICES": ""},
            "; CUDA_VISIBLE_DEVICES may hide it",
            "unset CUDA_VISIBLE_DEVICES",
        ),
        (CUDA, {}, ": the driver is too old", ""),
    ],
    ids=["another build", "hidden", "driver"],
)
def test_a_gpu_that_torch_does_not_see_is_a_warning_that_says_why(
    monkeypatch, build, hidden, said, fix
):
    for name in HIDING:
        monkeypatch.delenv(name, raising=False)
    for name, value in hidden.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        _checks, "gpus_without_torch", lambda: [("NVIDIA", "/proc/driver/nvidia/version")]
    )
    here = dataclasses.replace(machine(build=build), remarks=("the driver is too old",))
    (check,) = _checks.torch(case(here))
    assert (check.status, check.fix) == ("warning", fix)
    assert check.summary.endswith(f"NVIDIA's driver is loaded (/proc/driver/nvidia/version){said}")


def test_an_output_that_can_hold_only_ascii_gets_ascii_marks():
    raw = io.BytesIO()
    shown = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    render(examine(device="cpu", checks=["python"]), Console(file=shown, width=80))
    assert b"[+] python: Python" in raw.getvalue()


def test_every_check_is_documented():
    page = (ROOT / "docs" / "cli.md").read_text()
    assert [name for name in CHECKS if f"`{name}`" not in page] == []


def test_every_key_of_the_report_is_documented():
    page = (ROOT / "docs" / "cli.md").read_text()
    assert [key for key in examine(device="cpu", checks=[]) if f"\n| `{key}` |" not in page] == []


LIAR = """
from moe_routing_backends.eager.route import build as right
from moe_routing import RoutingOutput
from moe_routing_registry import hookimpl

@hookimpl
def moe_routing_backends():
    return []  # the test registers it by hand

def build(problem, device):
    bound = right(problem, device)

    def route(logits, **operands):
        weights, ids = bound(logits, **operands)
        return RoutingOutput(weights, ids.flip(1))

    return route
"""


def test_verify_tells_a_backend_that_is_wrong_from_one_that_is_right(install_plugin, monkeypatch):
    from moe_routing._registry import registry
    from moe_routing.conformance import quick

    monkeypatch.setattr(quick, "BUDGET_SECONDS", 20)
    monkeypatch.setattr(
        quick, "time", SimpleNamespace(monotonic=itertools.count().__next__)
    )  # a tick for each case
    install_plugin("liar", LIAR)
    registry().register(
        BackendSpec(
            name="liar", factories={"route": "liar:build"}, targets=(Target("cpu"),), priority=1
        )
    )
    try:
        report = examine(device="cpu", verify=True, checks=["verify"])
    finally:
        registry().unregister("liar")
    judged = {
        check["summary"].partition(" ")[0].rstrip(":"): check["status"]
        for check in report["checks"]
    }
    assert judged == {"liar": "problem", "eager": "ok"}
