"""The script of `make matrix` reports what failed. test_docs.py has the page of its results."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RUN = runpy.run_path(str(ROOT / "tests" / "versions" / "run.py"), run_name="versions")


def test_a_failure_is_known_wrong_or_missed():
    known, wrong, passed = RUN["judged"](
        ["tests.test_op.a[x]", "tests.test_op.b"],
        {"tests.test_op.a*": "why", "tests.test_op.c": "fixed meanwhile"},
    )
    assert known == {"tests.test_op.a[x]": "why"}
    assert wrong == ["tests.test_op.b"]
    assert passed == ["tests.test_op.c"]


def test_tests_are_counted_and_those_that_fail_are_named(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert False\n"
        "def test_left_out(): pytest.skip('why')\n"
    )
    found = RUN["tested"](Path(sys.executable), tmp_path, [str(tmp_path / "test_some.py")])
    assert (found["passed"], found["skipped"]) == (1, 1)
    assert [name.rpartition(".")[2] for name in found["failed"]] == ["test_wrong"]


def test_tests_that_cannot_be_collected_are_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="no_such_option"):
        RUN["tested"](Path(sys.executable), tmp_path, ["--no_such_option"])


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["nosuch"], "environments: expected some of oldest, gpus, later, newest, got nosuch"),
        (["oldest"], "PATH: expected python3.10, found none"),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_is_installed(
    names, said, capsys, monkeypatch, tmp_path
):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert RUN["main"](names) == 2
    assert capsys.readouterr().out.strip() == said


def test_results_are_of_the_environments_of_the_script():
    held = json.loads((ROOT / "tests" / "versions" / "results.json").read_text())
    assert held
    assert set(held) <= set(RUN["ENVIRONMENTS"])
