"""The command line where something around it fails.

stdout is closed or full, files cannot be written, sizes are impossible.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moe_routing.cli._app import run

pytestmark = pytest.mark.slow  # a process for each test

ROOT = Path(__file__).parents[1]
SOURCES = (ROOT, ROOT / "registry", ROOT / "backends")
COMMANDS = ["--help", "--version", "list", "list --json"]


def shell(line, *path, **environment):
    """Run a command line of a shell in which ``M`` is the program.

    Return the exit code, stdout and stderr.
    """
    sources = os.pathsep.join(map(str, (*path, *SOURCES)))
    environment = os.environ | {"PYTHONPATH": sources, "PYTHONIOENCODING": "utf-8"} | environment
    script = f'M() {{ "{sys.executable}" -m moe_routing "$@"; }}\nset -o pipefail\n{line}'
    done = subprocess.run(
        ["/bin/bash", "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("to", "said"),
    [
        (">&-", "stdout is closed, so there is nowhere to print to"),
        ("> /dev/full", "[Errno 28] No space left on device"),
    ],
)
def test_a_stdout_that_is_closed_or_full_is_one_line_and_exit_code_1(command, to, said):
    assert shell(f"M {command} {to}") == (1, "", f"moe-routing: {said}\n")


@pytest.mark.parametrize("to", [">&- 2>&-", "> /dev/full 2>&-", "> /dev/full 2> /dev/full"])
def test_where_stderr_is_gone_too_only_the_exit_code_is_left(to):
    assert shell(f"M list {to}") == (1, "", "")


def test_with_stderr_closed_the_answer_comes_all_the_same():
    code, out, _ = shell("M list mixtral --json 2>&-")
    assert (code, json.loads(out)["routers"][0]["name"]) == (0, "mixtral")


@pytest.mark.parametrize("command", ["list --json", "--help"])
def test_a_reader_that_has_read_enough_gets_silence(command):
    code, _, err = shell(f"M {command} | true")
    assert (code, err) == (1, "")


def test_a_terminal_without_the_letters_gets_escapes():
    code, out, _ = shell("M explain gemma4", PYTHONIOENCODING="ascii")
    assert code == 0
    assert out.isascii()


def test_torchs_warning_without_numpy_does_not_precede_the_answer(tmp_path):
    missing = "raise ModuleNotFoundError(\"No module named 'numpy'\", name='numpy')\n"
    (tmp_path / "numpy.py").write_text(missing)
    plain = "import warnings; warnings.simplefilter('always'); import torch; torch.zeros(1)"
    sources = {"PYTHONPATH": str(tmp_path)}
    warned = subprocess.run(
        [sys.executable, "-c", plain],
        env=os.environ | sources,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Failed to initialize NumPy" in warned.stderr
    for line in ("explain gemma4", "doctor --device cpu"):
        code, out, err = shell(f"M {line}", tmp_path)
        assert (code, err) == (0, "")
        assert "NumPy" not in out


# Wrong uses: one line, before any work


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "wrong.json").write_text('{"schema_version": 1, "settings": []}')
    (tmp_path / "endless.json").touch()
    os.truncate(tmp_path / "endless.json", 1 << 40)

    def call(*arguments):
        code = run(list(arguments))
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("bench --tokens 99999999999999", "--tokens: expected a problem that fits"),
        (
            "bench --tokens 999999999999999999999999",
            "--tokens: expected an integer of at most 18 digits",
        ),
        ("bench --tokens 1 --experts 99999999999999", "--tokens: expected a problem that fits"),
        (
            "bench --tokens 1 --router deepseek_v4_hash --experts 999999999",
            "--tokens: expected a problem that fits",
        ),
        ("explain gemma4 -e " + "9" * 5000, "expected an integer of at most 18 digits"),
        (
            "conformance eager --report nodir/x.html",
            "--report: expected a file that can be written, got 'nodir/x.html': No such",
        ),
        (
            "conformance eager --report folder.html",
            "--report: expected a file that can be written, got 'folder.html': Is a dir",
        ),
        (
            "conformance eager --report /proc/x.html",
            "--report: expected a file that can be written, got '/proc/x.html'",
        ),
        (
            "conformance eager --report x.pdf",
            "--report: expected a name that ends in .html, .json, .xml, got 'x.pdf'",
        ),
        (
            "bench --plot nodir/x.png",
            "--plot: expected a file that can be written, got 'nodir/x.png'",
        ),
        (
            "bench --plot folder.png",
            "--plot: expected a file that can be written, got 'folder.png'",
        ),
        ("report --out nodir/x.html", "--out: expected a file that can be written"),
        ("report --out folder.html", "--out: expected a file that can be written"),
        (
            "bench --against deep.json",
            "deep.json: expected what `moe-routing bench --json` prints, got RecursionError",
        ),
        (
            "bench --against wrong.json",
            "wrong.json: expected what `moe-routing bench --json` prints",
        ),
        (
            "bench --against endless.json",
            "endless.json: expected what `moe-routing bench --json` prints, got more than",
        ),
        (
            "bench --against /dev/zero",
            "/dev/zero: expected a file that `moe-routing bench --json` has written",
        ),
        ("bench --against .", ".: expected a file that `moe-routing bench --json` has written"),
        (
            "conformance eager --device cuba",
            "device: expected a device that torch knows, got 'cuba'",
        ),
        ("new-backend eager x", "name: expected one that is free, got 'eager'"),
        ("new-backend triton-xpu x", "name: expected one that is free, got 'triton-xpu'"),
        ("new-backend registry x", "there is a package moe_routing_registry here"),
        (f"new-backend {'a' * 101} x", "name: expected 1 to 100 of the characters"),
        ("new-backend all x", "name: expected one that is free, got 'all'"),
        ("new-backend acme /proc/x", "/proc/x"),
        ("new-backend acme deep.json", "directory: expected a new or an empty one"),
        ("list \x1b[31m", "has '\\x1b[31m' in its name"),
    ],
)
def test_what_cannot_be_done_is_one_line_before_any_work(cli, line, said):
    code, out, err = cli(*line.split(" "))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("moe-routing: ")
    assert said in err


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("explain gema4", 2),
        ("explain gemma4 --device cuba", 2),
        ("explain gemma4 -e 0", 2),
        ("doctor --check nope", 2),
        ("list zebra", 2),
        ("bench --tokens 0", 2),
        ("bench --backend triton --tokens 1", 1),
        ("conformance nope", 2),
        ("conformance eager --device cuda:7", 1),
        ("report --device cuba", 2),
        ("transformers nope", 2),
        ("tune", 1),
        ("tune --model nope", 2),
        ("tune --topk 0", 2),
        ("tune --colour", 2),
    ],
)
def test_with_json_a_failure_is_json_too(cli, line, code):
    found, out, err = cli(*line.split(), "--json")
    assert found == code
    assert json.loads(out)["error"]
    assert err.startswith("moe-routing: ")


def test_a_variable_that_cannot_be_is_named(cli, monkeypatch):
    monkeypatch.setenv("MOE_ROUTING_STRICT", "perhaps")
    assert cli("explain", "gemma4")[::2] == (
        2,
        "moe-routing: MOE_ROUTING_STRICT: expected 1 or 0, got 'perhaps'\n",
    )


# What the disk does not take after the work is shown all the same


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("conformance eager --clause 9 --report full.html", "eager conforms"),
        ("bench --tokens 1 --compare none --plot full.html", "backend: eager"),
        ("bench --tokens 1 --compare none --json --plot full.png", '"rows"'),
    ],
)
def test_results_are_printed_whatever_happens_to_their_files(cli, tmp_path, line, shown):
    for name in ("full.html", "full.png"):
        (tmp_path / name).symlink_to("/dev/full")
    code, out, err = cli(*line.split())
    assert code == 1
    assert shown in out
    assert "No space left on device" in err
    assert err.count("\n") == 1


def test_the_report_of_a_machine_without_matplotlib_is_a_page_that_says_so(tmp_path):
    script = """
import sys
sys.modules["matplotlib"] = None
import dataclasses, functools
from moe_routing.report import _gather
from moe_routing.conformance import runner
runner.run = functools.partial(runner.run, clauses=[4])
settings = _gather._settings
_gather._settings = lambda *chosen: dataclasses.replace(settings(*chosen), tokens=(1,))
from moe_routing.cli import main
main()
"""
    sources = {"PYTHONPATH": os.pathsep.join(map(str, SOURCES))}
    command = [
        sys.executable,
        "-c",
        script,
        "report",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "x.html"),
    ]
    done = subprocess.run(
        command, env=os.environ | sources, capture_output=True, text=True, check=False
    )
    page = (tmp_path / "x.html").read_text()
    assert (done.returncode, done.stderr) == (0, "")
    assert "no drawing: drawing raised ModuleNotFoundError" in page
    assert "<td>backend: eager</td>" in page


def test_one_check_is_shown_alone(cli):
    code, out, _ = cli("doctor", "--check", "python")
    assert code == 0
    assert out.splitlines()[0] == "Checks"
    assert len(out.splitlines()) == 3


def test_a_name_of_a_plug_in_is_taken_too(install_backend):
    site = install_backend("acme")
    code, out, err = shell("M new-backend acme x", site)
    assert (code, out) == (2, "")
    assert "expected one that is free, got 'acme'" in err


# At 40 columns


@pytest.mark.parametrize(
    "command", ["", "bench", "tune", "doctor", "conformance", "report", "explain", "list"]
)
@pytest.mark.parametrize("width", ["40", "60"])
def test_help_loses_no_word_where_it_is_narrow(cli, monkeypatch, command, width):
    texts = {}
    for columns in ("200", width):
        monkeypatch.setenv("COLUMNS", columns)
        _, out, _ = cli(*command.split(), "--help")
        texts[columns] = out
    assert "…" not in texts[width]
    assert not re.search(r"[a-z]\.\.\.\s", texts[width])
    for option in {word for word in texts["200"].split() if word.startswith("--")}:
        assert option.partition(",")[0].rstrip(".") in texts[width]


@pytest.mark.parametrize("columns", ["0", "1", "-3", "wide", "9" * 30])
def test_a_width_that_cannot_be_loses_nothing(cli, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    code, out, _ = cli("explain", "gemma4")
    assert code == 0
    assert "explicit_only" in out


@pytest.mark.parametrize(
    "line", ["explain gemma4", "list", "doctor --device cpu", "bench --tokens 1 --compare none"]
)
def test_at_40_columns_no_name_code_or_reason_is_lost(cli, monkeypatch, line):
    monkeypatch.setenv("COLUMNS", "40")
    _, out, _ = cli(*line.split())
    assert "…" not in out
    if line.startswith(("explain", "doctor --")):
        flat = " ".join(out.split())
        for text in (
            "torch-compile",
            "explicit_only",
            "fits, but is only used when it is named",
            "is for cuda and rocm",
        ):
            assert text in flat
