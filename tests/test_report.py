"""moe-routing report: one page that holds everything, whatever on the machine is broken."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moe_routing.bench import Settings, measuring
from moe_routing.cli._app import run
from moe_routing.conformance import runner
from moe_routing.doctor._machine import Failure
from moe_routing.report import _gather, gather, to_html

ROOT = Path(__file__).parents[1]
VOID = {"meta", "img", "source"}


@pytest.fixture(autouse=True)
def _a_short_one(monkeypatch):
    """Run the real kit and the real benchmark, on less."""
    monkeypatch.setattr(runner, "run", functools.partial(runner.run, clauses=[9]))
    monkeypatch.setattr(_gather, "_settings", lambda place: Settings(tokens=(1,), device=place))


@pytest.fixture(scope="module")
def everything():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "run", functools.partial(runner.run, clauses=[9]))
        patch.setattr(_gather, "_settings", lambda place: Settings(tokens=(1,), device=place))
        steps = []
        return gather("cpu", lambda *step: steps.append(step)), steps


@pytest.fixture
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def open_tags(page):
    """Return the tags that are never closed, and those closed out of order."""
    stack = []
    for closing, name in re.findall(r"<(/?)([a-z0-9]+)[^>]*>", page):
        if closing:
            assert stack.pop() == name
        elif name not in VOID and name != "doctype":
            stack.append(name)
    return stack


def test_the_page_holds_doctors_tables_the_conformance_matrix_and_the_plots(everything):
    gathered, _ = everything
    page = to_html(gathered)
    for heading in (
        "Checks",
        "Devices",
        "Toolchains",
        "Backends on cpu",
        "Conformance of eager on cpu",
        "Benchmark",
    ):
        assert f"<h2>{heading}</h2>" in page
    assert "class='matrix'" in page
    assert page.count("<img src='data:image/svg+xml;base64,") == 1
    assert "gemma4, bfloat16 logits, E = 128, K = 8, mode call" in page


def test_the_page_stands_alone_and_is_well_formed(everything):
    page = to_html(everything[0])
    assert open_tags(page) == []
    assert "http" not in page
    assert "<script" not in page
    assert "prefers-color-scheme: dark" in page
    assert "name='viewport'" in page


def test_progress_is_told_for_every_part(everything):
    assert {what for what, _, _ in everything[1]} == {"doctor", "conformance of eager", "bench"}


def test_what_a_machine_says_of_itself_is_text_not_markup(everything):
    doctor = json.loads(json.dumps(everything[0].doctor))
    doctor["devices"][0]["name"] = "<b>&"
    assert "<td>&lt;b&gt;&amp;</td>" in to_html(dataclasses.replace(everything[0], doctor=doctor))


def test_what_raises_is_kept_on_the_page_and_the_rest_goes_on(monkeypatch):
    def broken(*_arguments, **_named):
        msg = "the device is on fire <now>"
        raise RuntimeError(msg)

    monkeypatch.setattr(measuring, "measure", broken)
    gathered = gather("cpu", lambda *_: None)
    page = to_html(gathered)
    assert not gathered.ok
    assert "RuntimeError: the device is on fire &lt;now&gt;" in page
    assert "class='matrix'" in page
    assert gathered.to_dict()["bench"] == {"error": "RuntimeError: the device is on fire <now>"}
    assert (
        to_html(dataclasses.replace(gathered, conformance=Failure("X: y", "Traceback"))).count(
            "Traceback"
        )
        >= 1
    )


@pytest.mark.slow
def test_the_command_writes_the_page_and_says_where(capsys, tmp_path):
    code = run(["report", "--device", "cpu", "--out", str(tmp_path / "mine.html")])
    out, err = capsys.readouterr()
    assert (code, out, err) == (0, f"Report: {tmp_path}/mine.html\n", "")
    assert (tmp_path / "mine.html").read_text().startswith("<!doctype html>")


@pytest.mark.slow
def test_json_holds_the_same_and_writes_no_page(capsys, in_an_empty_folder):
    assert run(["report", "--device", "cpu", "--json"]) == 0
    held = json.loads(capsys.readouterr().out)
    assert held["ok"] is held["conformance"]["ok"] is held["doctor"]["ok"] is True
    assert held["bench"]["rows"][0]["microseconds"] > 0
    assert not list(in_an_empty_folder.iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--out here.pdf", "--out: expected a name that ends in .html, got 'here.pdf'"),
        (
            "--out nowhere/here.html",
            "--out: expected a file that can be written, got 'nowhere/here.html': No such file",
        ),
        ("--device warp:9", "device: expected a device that torch knows, got 'warp:9'"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(capsys, in_an_empty_folder, options, said):
    assert run(["report", *options.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1
    assert not list(in_an_empty_folder.iterdir())


@pytest.mark.slow
def test_beside_a_broken_torch_the_page_says_so_and_exit_code_is_1(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libtorch_cpu.so is missing')\n")
    sources = os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "registry", ROOT / "backends")))
    command = [sys.executable, "-m", "moe_routing", "report", "--out", str(tmp_path / "r.html")]
    environment = {**os.environ, "PYTHONPATH": sources}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    page = (tmp_path / "r.html").read_text()
    assert "libtorch_cpu.so is missing" in page
    assert "needs a look" in page
    assert "Conformance" not in page
