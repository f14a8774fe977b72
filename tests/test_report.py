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

from moe_routing.bench import measuring
from moe_routing.cli._app import run
from moe_routing.conformance import runner
from moe_routing.doctor._machine import Failure
from moe_routing.report import _gather, gather, to_html

ROOT = Path(__file__).parents[1]
VOID = {"meta", "img", "source"}


def less(patch):
    """Run the real kit and the real benchmark, on less."""
    settings = _gather._settings

    def one_token(operation, place):
        chosen = dataclasses.replace(settings(operation, place), tokens=(1,))
        return dataclasses.replace(chosen, dtypes=("bfloat16",)) if operation == "route" else chosen

    patch.setattr(runner, "run", functools.partial(runner.run, clauses=[4]))
    patch.setattr(_gather, "_settings", one_token)


@pytest.fixture(autouse=True)
def _less(monkeypatch):
    less(monkeypatch)


@pytest.fixture(scope="module")
def everything():
    with pytest.MonkeyPatch.context() as patch:
        less(patch)
        steps = []
        return gather("cpu", lambda *step: steps.append(step)), steps


@pytest.fixture(scope="module")
def page(everything):
    return to_html(everything[0])


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


def test_the_page_holds_doctors_tables_the_conformance_matrix_and_the_plots(page):
    for heading in (
        "Checks",
        "Devices",
        "Toolchains",
        "Backends on cpu",
        "Operations",
        "route: conformance of eager on cpu",
        "route: benchmark",
        "plan: conformance of eager on cpu",
        "plan: benchmark",
    ):
        assert f"<h2>{heading}</h2>" in page
    assert page.count("class='matrix'") == 2
    assert page.count("<img src='data:image/svg+xml;base64,") == 2
    assert "gemma4, bfloat16 logits, E = 128, K = 8, mode call" in page
    assert "plan, int32 ids, E = 128, K = 8, mode call" in page


def test_the_page_says_what_it_shows(everything, page):
    assert (
        "<p>This page has doctor&#x27;s findings for all operations, and conformance and "
        "benchmark of route and plan on cpu.</p>"
    ) in page
    for operation in ("route", "plan"):
        assert f"<td>{operation}</td><td>cpu</td><td>eager</td>" in page
    assert "moe-routing conformance eager --operation permute --device cpu" in page
    without = dataclasses.replace(everything[0], operations={})
    assert "No device here has a backend, so nothing was tried." in to_html(without)
    assert not without.ok


def test_the_page_stands_alone_and_is_well_formed(page):
    assert open_tags(page) == []
    assert "http" not in page
    assert "<script" not in page
    assert "prefers-color-scheme: dark" in page
    assert "name='viewport'" in page


def test_progress_is_told_for_every_part(everything):
    assert {what for what, _, _ in everything[1]} == {
        "doctor",
        "route: conformance of eager",
        "route: bench",
        "plan: conformance of eager",
        "plan: bench",
    }


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
    held = gathered.to_dict()["operations"]
    assert list(held) == ["route", "plan"]
    for tried in held.values():
        assert tried["bench"] == {"error": "RuntimeError: the device is on fire <now>"}
        assert tried["conformance"]["ok"] is True


def test_each_operation_is_tried_by_its_own_kit_and_benchmark(everything):
    operations = everything[0].operations
    assert list(operations) == ["route", "plan"]
    for name, tried in operations.items():
        assert tried.ok
        assert tried.conformance.operation == tried.bench.settings.operation == name


def test_a_failed_check_or_a_wrong_result_of_one_operation_is_not_fine(everything):
    gathered, _ = everything
    plan = gathered.operations["plan"]
    (check, *_), (row, *_) = plan.conformance.results, plan.bench.rows
    failed = dataclasses.replace(check, status="failed", message="other bits")
    for part in (
        {"conformance": dataclasses.replace(plan.conformance, results=[failed])},
        {"bench": dataclasses.replace(plan.bench, rows=[dataclasses.replace(row, wrong=("no",))])},
    ):
        wrong = {**gathered.operations, "plan": dataclasses.replace(plan, **part)}
        assert not dataclasses.replace(gathered, operations=wrong).ok


def test_what_the_kit_raises_is_on_the_page(everything):
    gathered, _ = everything
    broken = dataclasses.replace(
        gathered.operations["plan"], conformance=Failure("X: y", "the traceback of y")
    )
    failed = dataclasses.replace(gathered, operations={**gathered.operations, "plan": broken})
    assert gathered.ok
    assert not failed.ok
    assert "the traceback of y" in to_html(failed)


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
    assert held["ok"] is held["doctor"]["ok"] is True
    assert list(held["operations"]) == ["route", "plan"]
    for name, tried in held["operations"].items():
        assert (tried["backend"], tried["conformance"]["ok"]) == ("eager", True)
        assert tried["bench"]["operation"] == name
        assert tried["bench"]["rows"][0]["microseconds"] > 0
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
    assert "conformance of" not in page
    assert "nothing was tried" in page
