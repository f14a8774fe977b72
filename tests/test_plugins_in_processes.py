"""Plug-ins that hang, crash, print or patch, on disk and in real processes.

``moe-routing doctor`` names each, and everything else goes on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # a process for each test

ROOT = Path(__file__).parents[1]
HEAD = """
import os, sys, time
from moe_routing_registry import BackendSpec, Target, Verdict, hookimpl
def rule(problem, device): return Verdict.yes()
"""
TAIL = """
@hookimpl
def moe_routing_backends():
    return [BackendSpec(name="odd-backend", factories={"route": "odd:build"},
                        targets=(Target("cpu"),), supports=rule)]
"""
SECONDS = 8
"""Instead of the minute that doctor waits, so that the tests need not."""
LONG = 3600
"""Where nothing is waited for."""
DOCTOR = """
import moe_routing.doctor._plugins as plugins
plugins.SECONDS = {}
from moe_routing.cli import main
main()
"""


@pytest.fixture
def command(install_plugin):
    """Return what installs a plug-in with that body and runs a command line with it."""

    def run(body, *arguments, entry_point="odd", seconds=SECONDS):
        site = install_plugin("odd", HEAD + body + TAIL, entry_point=entry_point)
        sources = os.pathsep.join(map(str, (site, ROOT, ROOT / "registry", ROOT / "backends")))
        environment = os.environ | {"PYTHONPATH": sources, "PYTHONIOENCODING": "utf-8"}
        return subprocess.run(
            [sys.executable, "-c", DOCTOR.format(seconds), *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


WAITS = {
    "its import hangs": ("time.sleep(3600)", f"does not end within {SECONDS} seconds"),
    "its rule hangs": (
        "def rule(problem, device): time.sleep(3600)",
        f"does not end within {SECONDS} seconds",
    ),
    "its import leaves a thread": (
        "import threading; threading.Thread(target=time.sleep, args=(3600,)).start()",
        f"does not end within {SECONDS} seconds",
    ),
    "its import exits at once": ("os._exit(0)", "ends the process with exit code 0"),
    "its import crashes": ("os.abort()", "kills the process with SIGABRT"),
    "its rule crashes": (
        "def rule(problem, device): os.kill(os.getpid(), 11)",
        "kills the process with SIGSEGV",
    ),
}


@pytest.mark.parametrize(("body", "said"), WAITS.values(), ids=WAITS)
def test_doctor_leaves_out_a_plug_in_that_does_not_come_back(command, body, said):
    done = command(body, "doctor", "--device", "cpu", "--json")
    report = json.loads(done.stdout)
    (failure,) = report["plugin_failures"]
    assert (failure["name"], failure["distribution"], failure["code"]) == (
        "odd",
        "odd-dist 1.0",
        "import_failed",
    )
    assert said in failure["reason"]
    assert failure["fix"] == "pip uninstall odd-dist"
    assert report["reports"]["cpu"]["winner"] == "eager"
    (check,) = [check for check in report["checks"] if check["name"] == "plugins"]
    assert check["status"] == "warning"
    assert done.returncode == 0


def test_doctor_says_what_a_plug_in_changed_of_torch(command):
    body = (
        "import torch\ndef topk(*arguments, **named): return None\n"
        "torch.topk = topk\ntorch.set_default_dtype(torch.float64)"
    )
    done = command(body, "doctor", "--device", "cpu", "--check", "plugins", "--json", seconds=LONG)
    said = [check["summary"] for check in json.loads(done.stdout)["checks"]]
    assert "the plug-ins changed torch.topk, which is now odd.topk" in said
    assert "the plug-ins changed torch's default dtype, which is now torch.float64" in said


EXAMPLES = {
    "none": ("EXAMPLE = None", "example: expected a Problem, got None"),
    "one that raises": (
        (
            "class Problem:\n    to_dict, family = dict, ''\n"
            "    operation = property(lambda self: sys.exit())\nEXAMPLE = Problem()"
        ),
        "raised SystemExit",
    ),
    "one whose text raises": (
        (
            "class Problem:\n    to_dict, family, operation = dict, '', 'sort'\n"
            "    def __str__(self): sys.exit()\n"
            "EXAMPLE = Problem()"
        ),
        "raised SystemExit",
    ),
}
OPERATION = """
from moe_routing_registry import OperationSpec
@hookimpl
def moe_routing_operations():
    return [OperationSpec(name="sort", example="odd:EXAMPLE", oracle="odd:rule",
                          contract="odd:rule")]
"""


@pytest.mark.parametrize(("body", "said"), EXAMPLES.values(), ids=EXAMPLES)
def test_an_example_that_is_none_costs_only_its_operation(command, body, said):
    report = json.loads(
        command(f"{body}\n{OPERATION}", "doctor", "--device", "cpu", "--json", seconds=LONG).stdout
    )
    assert report["reports"]["cpu"]["winner"] == "eager"
    (sort,) = [operation for operation in report["operations"] if operation["name"] == "sort"]
    assert said in sort["devices"]["cpu"]["why"]


CHANGES = {
    "a function of a submodule, in a rule": (
        (
            "def rule(problem, device):\n    import torch\n"
            "    torch.cuda.is_available = lambda: True\n    return Verdict.yes()"
        ),
        ["the plug-ins changed torch.cuda.is_available, which is now odd.<lambda>"],
    ),
    "a method that a class inherits": (
        "import torch\ntorch.Tensor.contiguous = lambda self: self",
        ["the plug-ins changed torch.Tensor.contiguous, which is now odd.<lambda>"],
    ),
    "a function by a wrapper of its name": (
        (
            "import functools, torch.nn.functional as F\n"
            "@functools.wraps(F.glu)\ndef fast(x): return x\nF.glu = fast"
        ),
        ["the plug-ins changed torch.nn.functional.glu, which is now odd.fast"],
    ),
    "a function by a value that raises": (
        (
            "import torch\nclass Value:\n    def __getattr__(self, name): raise SystemExit\n"
            "    def __call__(self): pass\ntorch.special.logit = Value()"
        ),
        ["the plug-ins changed torch.special.logit, which is now something else"],
    ),
    "a function by none": (
        "import torch\ntorch.special.logit = None",
        ["the plug-ins changed torch.special.logit, which is no function now"],
    ),
    "nothing, but it imports the compiler": (
        "import torch._dynamo",
        [
            (
                "every plug-in loaded; backends: triton, triton-xpu, symmetric, all-reduce, "
                "all-to-all, torch-compile, eager, odd-backend"
            )
        ],
    ),
}


@pytest.mark.parametrize(("body", "said"), CHANGES.values(), ids=CHANGES)
def test_doctor_says_what_a_plug_in_changed_wherever_it_is(command, body, said):
    done = command(body, "doctor", "--device", "cpu", "--check", "plugins", "--json", seconds=LONG)
    assert [check["summary"] for check in json.loads(done.stdout)["checks"]] == said


def test_where_metadata_that_cannot_be_decoded_takes_torch_down_doctor_names_its_distribution(
    tmp_path,
):
    info = tmp_path / "mangled-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mangled\nVersion: 1.0\n")
    (info / "entry_points.txt").write_bytes(b"\xff\xfe")
    sources = os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "registry", ROOT / "backends")))
    command = [sys.executable, "-m", "moe_routing", "doctor", "--device", "cpu", "--json"]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": sources},
        capture_output=True,
        text=True,
        check=False,
    )
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert "UnicodeDecodeError" in checks["torch"]["summary"]
    assert checks["torch"]["fix"] == checks["plugins"]["fix"] == "pip uninstall mangled"
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": sources, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        capture_output=True,
        check=True,
    )
    assert json.loads(done.stdout)["reports"]["cpu"]["winner"] == "eager"


PRINTS = """
import atexit
atexit.register(print, "at exit")
atexit.register(os.system, "echo at exit")
print("print")
os.write(1, b"file descriptor\\n")
os.system("echo a process")
def rule(problem, device):
    print("rule"); os.write(1, b"rule\\n")
    return Verdict.yes()
def build(problem, device):
    print("factory"); os.write(1, b"factory\\n")
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ("doctor", "--device", "cpu", "--json"),
        ("list", "--json"),
        ("explain", "mixtral", "--backend", "odd-backend", "--json"),
        ("bench", "--tokens", "1", "--backend", "odd-backend", "--json"),
        ("conformance", "odd-backend", "--clause", "9", "--json"),
        ("tune", "--device", "cpu", "--json"),
        ("report", "--device", "warp", "--json"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_plug_in_that_prints_leaves_json_alone(command, arguments):
    done = command(PRINTS, *arguments)
    assert isinstance(json.loads(done.stdout), dict)
    assert "Traceback" not in done.stderr


def test_a_plug_in_that_asks_for_input_gets_none(command):
    done = command("input('your name? ')", "list", "mixtral", "--json")
    assert json.loads(done.stdout)["routers"][0]["name"] == "mixtral"
    assert "its import raised EOFError" in done.stderr


def test_a_plug_in_that_prints_leaves_tables_alone(command):
    done = command(PRINTS, "explain", "mixtral")
    assert "eager" in done.stdout
    for printed in ("at exit", "print\n", "file descriptor", "a process", "rule\n"):
        assert printed not in done.stdout
        assert printed in done.stderr
