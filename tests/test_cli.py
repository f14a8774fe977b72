"""The command line: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from moe_routing.cli._app import run
from moe_routing.families import FAMILIES
from moe_routing.models import MODELS
from moe_routing_registry import BackendSpec, RejectCode, Target, Verdict

ROOT = Path(__file__).parents[1]
FIX = (
    "pip install 'picky[float32]==1.0' --no-deps --upgrade --pre --no-cache-dir "
    "--require-virtualenv"
)


@pytest.fixture
def cli(capsys, monkeypatch):
    """Run a command line here; return exit code, stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "80")

    def call(line):
        code = run(line.split())
        return code, *capsys.readouterr()

    return call


def flat(text):
    """Undo the wrapping."""
    return " ".join(text.split())


def process(*command, **environment):
    """Run Python in a process of its own, its output piped."""
    inherited = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    sources = os.pathsep.join(map(str, (ROOT, ROOT / "registry", ROOT / "backends")))
    environment = inherited | {"PYTHONPATH": sources, "PYTHONIOENCODING": "utf-8"} | environment
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, check=False
    )


@pytest.fixture
def picky():
    """A backend of this process that is for the CPU, and knows one family and no float32."""
    from moe_routing._registry import registry

    def supports(problem, _device):
        if problem.dtype == "float32":
            return Verdict.no(RejectCode.DTYPE, "takes no float32", FIX)
        return Verdict.yes()

    spec = BackendSpec(
        name="picky",
        factories={"route": "picky:build"},
        targets=(Target("cpu"),),
        priority=3,
        supports=supports,
    )
    registry().register(spec)
    yield spec
    registry().unregister("picky")


def test_importing_the_command_line_imports_no_torch():
    script = (
        "import sys, moe_routing.cli._app; print(sorted({'torch', 'triton'} & set(sys.modules)))"
    )
    done = process("-c", script)
    assert done.stdout.decode().strip() == "[]"


def test_python_m_is_the_command_line():
    done = process("-m", "moe_routing", "--version")
    assert (done.returncode, done.stdout.decode()) == (0, f"moe-routing {version('moe-routing')}\n")


def test_without_a_command_it_shows_help_with_examples(cli):
    code, out, _ = cli("")
    assert code == 0
    assert "  moe-routing explain gemma4 --device cuda:0\n" in out


@pytest.mark.parametrize("command", ["doctor", "list", "explain", "conformance", "scale"])
def test_help_teaches_with_examples_that_fit_80_columns(cli, command):
    code, out, _ = cli(f"{command} --help")
    examples = out.partition("Examples\n")[2].splitlines()
    assert code == 0
    assert [line for line in examples if line.startswith(f"  moe-routing {command}")]
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("command", ["doctor", "list", "explain", "scale"])
def test_every_example_of_the_help_is_a_command_line_that_parses(cli, command):
    _, out, _ = cli(f"{command} --help")
    lines = [
        line
        for line in out.partition("Examples\n")[2].splitlines()
        if line.startswith("  moe-routing ")
    ]
    assert lines
    for line in lines:
        if "--verify" not in line:
            code, _, err = cli(line.partition("|")[0].removeprefix("  moe-routing "))
            assert code in {0, 1}, err


def test_list_names_every_family_and_model_with_its_formula(cli):
    code, out, _ = cli("list --json")
    routers = {entry["name"]: entry for entry in json.loads(out)["routers"]}
    assert code == 0
    assert set(routers) >= {*FAMILIES, *MODELS}
    assert routers["mixtral"] == {
        "name": "mixtral",
        "kind": "model",
        "family": MODELS["mixtral"].family,
        "formula": "ids = topk(l); w = softmax(l[ids])",
        "source": MODELS["mixtral"].source,
        "num_experts": MODELS["mixtral"].num_experts,
        "topk": MODELS["mixtral"].topk,
    }


def test_list_shows_names_whole_at_80_columns(cli):
    _, out, _ = cli("list")
    words = set(out.replace(",", " ").split())
    assert {*FAMILIES, *MODELS} <= words


def test_list_of_a_text_shows_only_names_with_it_and_their_source(cli):
    code, out, _ = cli("list deepseek_v3")
    assert code == 0
    assert "deepseek_v3, deepseek_v32" in out
    assert "DeepseekV3TopkRouter" in out
    assert "mixtral" not in out


def test_list_of_a_text_that_nothing_contains_is_wrong_usage(cli):
    code, out, err = cli("list zebra")
    said = "no family, model or operation has 'zebra' in its name; `moe-routing list` shows all"
    assert (code, out, err) == (2, "", f"moe-routing: {said}\n")


def test_explain_shows_the_choice_and_why(cli):
    code, out, _ = cli("explain gemma4 --device cpu")
    assert code == 0
    assert "ids = topk(l); w = softmax(l[ids]) * per_expert_scale[ids]" in out
    assert "eager" in out
    assert "the best that fits this device" in out


def test_explain_takes_e_and_k_from_the_model(cli):
    _, out, _ = cli("explain deepseek_v3 --json")
    problem = json.loads(out)["problem"]
    assert (problem["num_experts"], problem["topk"], problem["dtype"]) == (256, 8, "bfloat16")


def test_explain_takes_e_k_dtype_and_backend_from_its_options(cli):
    _, out, _ = cli("explain softmax_topk -e 60 -k 4 --dtype float16 --backend eager --json")
    report = json.loads(out)
    problem = report["problem"]
    assert (problem["num_experts"], problem["topk"], problem["dtype"]) == (60, 4, "float16")
    assert (report["requested"], report["asked_by"], report["winner"]) == (
        "eager",
        "argument",
        "eager",
    )


def test_explain_takes_the_dtype_of_another_operation(cli):
    _, out, _ = cli("explain permute -k 4 --dtype float16 --json")
    assert json.loads(out)["problem"]["dtype"] == "float16"


@pytest.mark.usefixtures("picky")
def test_explain_shows_the_rejected_with_code_sentence_and_a_whole_command(cli):
    code, out, _ = cli("explain gemma4 --dtype float32")
    assert code == 0
    assert "takes no float32" in out
    assert "dtype" in out
    assert f"    {FIX}\n" in out


@pytest.mark.usefixtures("picky")
def test_a_named_backend_that_cannot_is_exit_code_1(cli):
    code, out, _ = cli("explain gemma4 --dtype float32 --backend picky")
    assert code == 1
    assert "no backend: backend 'picky' cannot be used here" in out


def test_a_device_that_is_not_here_is_exit_code_1(cli):
    code, out, _ = cli("explain gemma4 --device cuda:77")
    assert code == 1
    assert "'cuda:77' is not on this machine" in flat(out)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("explain gema4", "unknown router 'gema4': did you mean 'gemma4'"),
        ("explain gemma4 --backend eagre", "unknown backend 'eagre': did you mean 'eager'?"),
        ("explain gemma4 --device cuba", "device: expected a device that torch knows, got 'cuba'"),
        (
            "explain gemma4 --dtype int8",
            "'int8' is not one of 'float16', 'bfloat16', 'float32', 'float64'",
        ),
        ("explain gemma4 -e 4 -k 5", "topk"),
        ("explain gemma4 -e zero", "expected an integer >= 1, got 'zero'"),
        ("explain gemma4 -k 0", "expected an integer >= 1, got '0'"),
        ("explain deepseek_v3 -e 30", "num_groups"),
        ("explain", "ROUTER"),
        ("explain gemma4 --divice cpu", "--device"),
        ("explain doge", "the routing of 'doge' cannot be expressed: "),
        ("doctor --router gema4", "unknown router 'gema4': did you mean 'gemma4'"),
        ("doctor --device cuba", "device: expected a device that torch knows, got 'cuba'"),
        ("conformance eagre", "unknown backend 'eagre': did you mean 'eager'?"),
        ("doctor --check trition", "unknown check 'trition': did you mean 'triton'"),
        ("paint", "'paint'"),
    ],
)
def test_wrong_usage_is_one_line_on_stderr_and_exit_code_2(cli, line, said):
    code, out, err = cli(line)
    assert (code, out) == (2, "")
    assert err.startswith("moe-routing: ")
    assert err.count("\n") == 1
    assert said in err


@pytest.mark.slow
def test_explain_beside_a_broken_torch_is_one_line_and_exit_code_1(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libtorch_cpu.so is missing')\n")
    sources = os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "registry", ROOT / "backends")))
    done = process("-m", "moe_routing", "explain", "gemma4", PYTHONPATH=sources)
    assert (done.returncode, done.stdout) == (1, b"")
    cause = b"OSError: libtorch_cpu.so is missing"
    said = b"torch cannot be used (%s); `moe-routing doctor` says more\n" % cause
    assert said in done.stderr
    assert done.stderr.count(b"\n") == 1


def test_doctor_of_a_healthy_cpu_is_exit_code_0(cli):
    code, out, _ = cli("doctor --device cpu")
    assert code == 0
    assert "[✓] backend: cpu routes gemma4 with eager" in out
    assert out.endswith("No problems.\n")


def test_doctor_of_a_device_that_is_not_here_is_exit_code_1(cli):
    code, out, _ = cli("doctor --device cuda:77")
    assert code == 1
    assert "[✗] devices: device: 'cuda:77' is not on this machine" in flat(out)


def test_doctor_judges_backends_by_the_router_that_was_named(cli):
    _, out, _ = cli("doctor --device cpu --router deepseek_v3")
    assert "Backends for deepseek_v3 with E=256 K=8 bfloat16 on cpu" in out


def test_doctor_runs_only_the_checks_that_were_named(cli):
    _, out, _ = cli("doctor --device cpu --check torch --check backend --json")
    assert [check["name"] for check in json.loads(out)["checks"]] == ["torch", "backend"]


@pytest.mark.usefixtures("picky")
def test_a_backend_in_the_environment_that_cannot_be_used_is_exit_code_1(cli, monkeypatch):
    monkeypatch.setenv("MOE_ROUTING_BACKEND", "picky")
    assert cli("doctor --device cpu")[0] == 0
    code, out, _ = cli("doctor --device meta")
    assert code == 1
    assert (
        "backend 'picky', asked for by MOE_ROUTING_BACKEND=picky, cannot be used here: "
        "is for cpu, the device is meta [platform]" in flat(out)
    )


@pytest.mark.slow
def test_piped_output_is_not_wrapped_at_all():
    done = process("-m", "moe_routing", "list", "--verbose")
    longest = max(done.stdout.decode().splitlines(), key=len)
    assert len(longest) > 80
    assert done.returncode == 0


def test_a_plug_in_that_fails_or_prints_leaves_json_intact_and_is_one_line_on_stderr(
    install_plugin,
):
    site = install_plugin(
        "noisy",
        "print('hello from a plug-in')\nraise OSError('no luck')\n",
        distribution="moe-noisy",
    )
    sources = os.pathsep.join(map(str, (site, ROOT, ROOT / "registry", ROOT / "backends")))
    done = process("-m", "moe_routing", "list", "mixtral", "--json", PYTHONPATH=sources)
    warnings = [line for line in done.stderr.decode().splitlines() if "hello" not in line]
    assert json.loads(done.stdout)["routers"][0]["name"] == "mixtral"
    assert len(warnings) == 1
    assert warnings[0].startswith(
        "moe-routing: warning: plug-in 'noisy' of moe-noisy 1.0 is not used"
    )


def test_every_command_is_documented(cli):
    _, out, _ = cli("--help")
    commands = re.findall(r"^│ ([a-z][a-z-]*) ", out, re.MULTILINE)
    page = (ROOT / "docs" / "cli.md").read_text()
    assert {"doctor", "list", "explain", "conformance"} <= set(commands)
    assert [command for command in commands if f"\n## {command}\n" not in page] == []
