"""The demo: what it shows, and its exit codes."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import moe_routing

DEMO = Path(__file__).parents[1] / "examples" / "demo.py"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def demo(monkeypatch, capsys):
    """Run the demo in this process, in a terminal of 80 columns.

    Return its exit code and its output.
    """

    def run(*arguments):
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setattr(sys, "argv", ["demo.py", *arguments])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(DEMO), run_name="__main__")
        out, err = capsys.readouterr()
        return exit_.value.code, out + err

    return run


@pytest.mark.parametrize(
    "model",
    [
        "gemma4",
        *(
            pytest.param(model, marks=pytest.mark.slow)
            for model in ("deepseek_v3", "qwen3_moe", "gpt_oss")
        ),
    ],
)
def test_demo_agrees_with_the_model_in_every_layer_and_fits_80_columns(demo, model):
    code, shown = demo("--model", model)
    assert code == 0
    assert shown.count("256 / 256") == 6
    assert "every layer agrees" in shown
    assert f"eager: {moe_routing.get_router(model).report.why}" in shown
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.slow
def test_demo_fails_where_the_routers_disagree(demo, monkeypatch):
    right = moe_routing.get_router("gpt_oss").spec
    monkeypatch.setattr(
        moe_routing, "get_router", lambda _model, **_: moe_routing.Router(right.replace(scale=1.01))
    )
    code, shown = demo("--model", "gpt_oss")
    assert code == 1
    assert shown.count("DIFFER") == 6
    assert "the two disagree" in shown


def test_demo_names_the_backends_where_the_one_asked_for_is_unknown(demo):
    code, shown = demo("--backend", "eagr")
    assert code == 2
    assert "did you mean 'eager'" in shown


@pytest.mark.slow
def test_demo_without_transformers_says_what_mends_it():
    code = (
        "import sys, runpy; sys.modules['transformers'] = None; "
        f"runpy.run_path({str(DEMO)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "python -m pip install -e '.[transformers]'" in done.stdout
    assert not done.stderr
