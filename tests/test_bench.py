"""``moe-routing bench``: wrong backends get no number, and plots are drawn.

What got slower is reported.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moe_routing
from moe_routing.bench import Case, Result, Row, Settings, _clock, losses
from moe_routing.bench._clock import refusal
from moe_routing.bench._implementation import MOST_SETS, NotMeasuredError
from moe_routing.bench.route._check import problems
from moe_routing.bench.route._formulas import formula_of, one_hot
from moe_routing.bench.route._implementations import _own, backend, comparison
from moe_routing.bench.route._inputs import make
from moe_routing.cli._app import run
from moe_routing.families import FAMILIES
from moe_routing_registry import BackendSpec, Target

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "benchmarks" / "figures.py"
CPU = torch.device("cpu")
SHORT = "bench --device cpu --dtype fp32 --experts 32 --topk 4"


@pytest.fixture
def cli(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")

    def call(line):
        code = run(line.split())
        return code, *capsys.readouterr()

    return call


def process(script, *arguments, **environment):
    sources = os.pathsep.join(map(str, (ROOT, ROOT / "registry", ROOT / "backends")))
    inherited = {**os.environ, "PYTHONPATH": sources, **environment}
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=inherited)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A run of the CPU, as `bench --json` prints it."""
    path = tmp_path_factory.mktemp("kept") / "run.json"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = run([*SHORT.split(), "--tokens", "1,16", "--json"])
    assert code == 0
    path.write_text(printed.getvalue())
    return path


@pytest.fixture
def other_than(kept, tmp_path):
    """Write the kept run with a change."""

    def write(change):
        held = json.loads(kept.read_text())
        change(held)
        path = tmp_path / "other.json"
        path.write_text(json.dumps(held))
        return path

    return write


MEASURED = 7.0
"""Microseconds that every call takes by the clock of these tests."""


@pytest.fixture
def _steady_clock(monkeypatch):
    """Run what is to be timed, and say that it took the same time.

    So no test depends on how busy the machine is.
    """

    def call(work, _device):
        work()
        return MEASURED

    monkeypatch.setattr(_clock, "call", call)


def every_round(microseconds):
    def change(held):
        for row in held["rows"]:
            row["rounds"] = [microseconds] * 5

    return change


def test_importing_it_imports_no_torch_triton_or_matplotlib():
    heavy = "{'torch', 'triton', 'matplotlib'}"
    script = f"import sys, moe_routing.bench; print(sorted({heavy} & set(sys.modules)))"
    assert process(script).stdout.strip() == "[]"


def test_a_run_holds_time_spread_bandwidth_and_floors_of_every_configuration(kept):
    held = json.loads(kept.read_text())
    assert [(row["tokens"], row["implementation"], row["is_backend"]) for row in held["rows"]] == [
        (1, "eager", True), (1, "eager", False), (16, "eager", True), (16, "eager", False),
    ]  # fmt: skip
    for row in held["rows"]:
        assert len(row["rounds"]) == 5
        assert min(row["rounds"]) <= row["microseconds"] <= max(row["rounds"])
        assert row["bytes_per_second"] == pytest.approx(
            row["bytes"] / row["microseconds"] * 1e6, rel=1e-3
        )
        assert row["microseconds"] > 0
    assert held["copy_bytes_per_second"] > 0
    assert held["launch_floor_us"]["call"] > 0
    assert held["rows"][2]["bytes"] == 16 * (32 * 4 + 4 * 8) + 32 * 4
    assert held["device"]["threads"] == 1


def test_a_run_reads_back_as_it_was_written(kept):
    assert Result.read(kept).to_dict() == json.loads(kept.read_text())


def test_the_table_has_a_line_for_every_implementation_and_says_what_was_not_measured(cli):
    code, out, err = cli(f"{SHORT} --tokens 1 --compare eager,baseline")
    assert (code, err) == (0, "")
    assert "gemma4, float32 logits, E = 32, K = 4, mode call" in out
    assert "backend: eager" in out
    assert "comparison: eager" in out
    assert "not measured: comparison: baseline: a Triton kernel, which needs a GPU" in out


WRONG = """
from moe_routing import RoutingOutput
from moe_routing_backends.eager.route import build as right

def build(problem, device):
    bound = right(problem, device)
    def route(logits, *, out=None, **operands):
        weights, ids = bound(logits, **operands)
        {spoil}
        if out is None:
            return RoutingOutput(weights, ids)
        out.weights.copy_(weights)
        out.ids.copy_(ids)
        return out
    return route
"""


@pytest.fixture
def spoilt(tmp_path, monkeypatch):
    """Register the eager backend, spoilt by a line, under a name of its own.

    Routers are kept by their names.
    """
    from moe_routing._registry import registry

    monkeypatch.syspath_prepend(str(tmp_path))
    registered = []

    def register(line):
        name = f"spoilt_{tmp_path.name.replace('-', '_')}"
        (tmp_path / f"{name}.py").write_text(WRONG.format(spoil=line))
        registry().register(
            BackendSpec(name=name, factories={"route": f"{name}:build"}, targets=(Target("cpu"),))
        )
        registered.append(name)
        return name

    yield register
    for name in registered:
        registry().unregister(name)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("weights[-1, 0] *= 1.00001", "weight of id"),
        pytest.param("ids[0, :2] = ids[0, :2].flip(0)", "stands before id", marks=pytest.mark.slow),
        pytest.param("ids[0, 0] = ids[0, 1]", "are not unique", marks=pytest.mark.slow),
        pytest.param(
            "weights[0, 0] = float('nan')", "not written, or not finite", marks=pytest.mark.slow
        ),
        (
            "weights = weights if out is not None else 2 * weights",
            "with outputs that it allocates itself",
        ),
    ],
)
def test_a_wrong_backend_gets_no_number_and_exit_code_1(cli, spoilt, line, said):
    name = spoilt(line)
    code, out, _ = cli(f"{SHORT} --tokens 16 --backend {name},eager --compare none --json")
    wrong, right = json.loads(out)["rows"]
    assert code == 1
    assert (wrong["implementation"], wrong["microseconds"], wrong["rounds"]) == (name, None, [])
    assert said in wrong["wrong"][0]
    assert right["microseconds"] > 0


def test_a_wrong_last_row_of_very_many_is_seen():
    inputs = make(Case("gemma4", "float32", 8, 2, 9000), CPU, 1)
    right = backend("eager", inputs)

    def into(logits, out):
        right.into(logits, out)
        out.ids[-1] = out.ids[-1].flip(0)

    assert problems(right, inputs) == []
    assert "rows from 6952: row 2047" in problems(right._replace(into=into), inputs)[0]


def test_rows_that_are_not_written_are_seen_although_memory_holds_the_right_answer():
    inputs = make(Case("gemma4", "float32", 8, 2, 10), CPU, 1)
    right = backend("eager", inputs)
    right.into(inputs.logits[0], inputs.outs[0])
    assert problems(right._replace(into=lambda _logits, _out: None), inputs) == [
        "row 0: not written, or not finite"
    ]


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_formula_in_plain_pytorch_computes_what_the_oracle_computes(family, dtype):
    spec = FAMILIES[family].spec
    inputs = make(Case(family, dtype, 64, 8, 300), CPU, 1)
    if formula_of(spec) is None:
        with pytest.raises(NotMeasuredError, match=family):
            comparison("eager", inputs)
        return
    assert problems(comparison("eager", inputs), inputs) == []


def test_a_comparison_that_computes_something_else_is_wrong():
    inputs = make(Case("gemma4", "float32", 64, 8, 300), CPU, 1)
    implementation = comparison("eager", inputs)
    assert problems(
        implementation._replace(call=lambda logits: implementation.call(-logits)), inputs
    )
    assert problems(
        implementation._replace(
            call=lambda logits: (
                implementation.call(logits)[0] * 1.01,
                implementation.call(logits)[1],
            )
        ),
        inputs,
    )


@pytest.mark.parametrize(
    ("tokens", "cache", "sets"), [(1, 1 << 26, MOST_SETS), (4096, 1 << 20, 4), (1024, 1 << 22, 15)]
)
def test_inputs_rotate_over_twice_the_cache_where_256_sets_are_enough(tokens, cache, sets):
    inputs = make(Case("gemma4", "float32", 128, 8, tokens), CPU, cache)
    assert len(inputs.logits) == len(inputs.outs) == sets
    assert sets in (4, MOST_SETS) or inputs.bytes * (sets - 1) < 2 * cache <= inputs.bytes * sets
    assert len({logits.data_ptr() for logits in inputs.logits}) == sets


@pytest.mark.slow
def test_an_implementation_that_makes_its_own_graphs_is_not_captured_in_another():
    inputs = make(Case("gemma4", "float32", 8, 2, 2), CPU, 1)
    implementation = comparison("compile-reduce-overhead", inputs)
    assert "makes CUDA graphs of its own" in refusal("graph", implementation)
    assert refusal("call", implementation) == ""


@pytest.mark.slow
def test_torch_compile_is_a_comparison():
    inputs = make(Case("softmax_topk", "float32", 8, 2, 2), CPU, 1)
    implementation = comparison("compile-default", inputs)
    assert implementation.not_captured == ""
    assert problems(implementation, inputs) == []


def test_what_is_compiled_for_one_shape_is_not_counted_as_a_recompilation_of_another():
    assert _own(one_hot).__code__ is not _own(one_hot).__code__
    assert _own(one_hot).__code__ != one_hot.__code__


@pytest.mark.usefixtures("_steady_clock")
def test_against_a_slower_run_is_exit_code_0(cli, other_than):
    slow = other_than(every_round(2 * MEASURED))
    code, out, _ = cli(f"bench --against {slow} --json")
    assert (code, json.loads(out)["losses"]) == (0, [])


@pytest.mark.usefixtures("_steady_clock")
def test_against_a_faster_run_is_exit_code_1_and_says_which(cli, other_than):
    def first_alone(held):
        every_round(2 * MEASURED)(held)
        held["rows"][0]["rounds"] = [MEASURED / 2] * 5

    fast = other_than(first_alone)
    code, out, _ = cli(f"bench --against {fast}")
    assert code == 1
    assert out.count("slower: ") == 1
    assert "slower: gemma4 float32 E=32 K=4 T=1 call backend: eager: " in out
    assert out.endswith("2 configurations compared, 1 slower than the noise of both runs\n")


@pytest.mark.parametrize(("factor", "lost"), [(0.9, 0), (1.05, 0), (1.15, 1)])
def test_a_loss_is_more_than_the_noise_of_both_runs(kept, factor, lost):
    before = Result.read(kept)
    row = dataclasses.replace(before.rows[0], rounds=(100.0, 105.0, 110.0))
    before.rows, before.settings = [row], dataclasses.replace(before.settings, tokens=(1,))
    now = dataclasses.replace(
        before, rows=[dataclasses.replace(row, rounds=tuple(factor * each for each in row.rounds))]
    )
    assert len(losses(before, now)) == lost


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        (lambda held: held["device"].update(name="A64FX"), "", "same device, name"),
        (lambda held: held["device"].update(threads=64), "", "same device, threads 1, got 64"),
        (lambda _held: None, "--tokens 3", "got one without gemma4 float32 E=32 K=4 T=3 call"),
        (lambda _held: None, "--experts 16", "got one without gemma4 float32 E=16"),
        (lambda held: held.update(schema_version=0), "", "expected schema_version 1, got 0"),
        (lambda held: held.pop("rows"), "", "expected what `moe-routing bench --json` prints"),
    ],
)
def test_against_another_device_or_configuration_is_exit_code_2(
    cli, other_than, change, options, said
):
    code, out, err = cli(f"bench --against {other_than(change)} {options}")
    assert (code, out) == (2, "")
    assert err.startswith("moe-routing: --against: ")
    assert said in err


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (
            "--mode graph",
            2,
            "--mode: expected call on the CPU, which has no graphs and is its own host, got graph",
        ),
        ("--mode host", 2, "--mode: expected call on the CPU"),
        ("--mode fast", 2, "--mode: expected one of graph, call, host, got 'fast'"),
        ("--dtype bf61", 2, "--dtype: expected one of bfloat16, float16, float32, got 'bf61'"),
        ("--compare cuda", 2, "--compare: expected one of baseline, eager, compile-default"),
        ("--tokens 1,x", 2, "--tokens: expected an integer >= 1, got 'x'"),
        ("--topk 200", 2, "--topk: expected 1 <= topk <= num_experts (128), got 200"),
        ("--router gema4", 2, "unknown router 'gema4': did you mean 'gemma4'"),
        ("--backend eagre", 2, "unknown backend 'eagre': did you mean 'eager'?"),
        ("--backend triton", 1, "backend 'triton' cannot be used here"),
        ("--device cuda:7", 1, "device: 'cuda:7' is not on this machine"),
        (
            "--plot here.gif",
            2,
            "--plot: expected a name that ends in .png or .html, got 'here.gif'",
        ),
        ("--against nowhere.json", 2, "No such file"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is(cli, options, code, said):
    found, out, err = cli(f"bench --device cpu {options}")
    assert (found, out) == (code, "")
    assert said in err


def test_json_and_csv_at_once_are_refused_as_json(cli):
    code, out, err = cli("bench --device cpu --json --csv")
    assert code == 2
    assert json.loads(out)["error"] == "--csv: expected one of --json and --csv, got both"
    assert "--csv: expected one of" in err


def test_a_plot_without_matplotlib_names_the_extra():
    script = (
        "import sys; sys.modules['matplotlib'] = None; from moe_routing.cli import main; main()"
    )
    done = process(script, "bench", "--plot", "x.png")
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr
        == "moe-routing: --plot: matplotlib is not installed: pip install 'moe-routing[bench]'\n"
    )


@pytest.mark.slow
def test_csv_has_a_line_for_every_row_and_plots_are_a_picture_and_a_page_of_its_own(cli, tmp_path):
    threads = torch.get_num_threads()
    code, out, err = cli(
        f"{SHORT} --tokens 1,16 --csv --plot {tmp_path}/a.png --plot {tmp_path}/a.html "
        "--compare none"
    )
    assert (code, err) == (0, "")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [(row["tokens"], row["implementation"]) for row in rows] == [
        ("1", "eager"),
        ("16", "eager"),
    ]
    assert all(float(row["microseconds"]) > 0 for row in rows)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "a.html").read_text()
    assert (
        page.count("src='data:image/svg+xml;base64,")
        == page.count("media='(prefers-color-scheme: dark)'")
        == 1
    )
    assert "http" not in page
    assert torch.get_num_threads() == threads  # one timed it


@pytest.mark.slow
def test_a_drawing_shows_every_way_and_both_floors(kept):
    from moe_routing.bench.plot import DARK, LIGHT, facets, svg

    result = Result.read(kept)
    (facet,) = facets(result)
    light, dark = svg(result, facet, LIGHT), svg(result, facet, DARK)
    for label in (
        "backend: eager",
        "comparison: eager",
        "a copy of the same bytes",
        "the smallest launch",
        "tokens T",
    ):
        assert f">{label}</text>" in light
    assert LIGHT.ink in light
    assert LIGHT.ink not in dark
    assert svg(result, facet, LIGHT) == light


@pytest.mark.slow
def test_the_full_sort_routes_as_the_eager_backend_does():
    script = """
import torch, moe_routing
from moe_routing.bench.full_sort import full_sort
logits, scale = torch.randn(3, 24), torch.rand(24)
logits[0, 5] = logits[0, 7]
out = torch.empty(3, 4), torch.empty(3, 4, dtype=torch.int32)
full_sort(logits, 4, scale, out)
weights, ids = moe_routing.get_router("gemma4")(logits, 4, scale)
assert torch.equal(ids, out[1])
torch.testing.assert_close(weights, out[0])
"""
    done = process(script, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_row_knows_its_rounds():
    row = Row(
        case=Case("gemma4", "float32", 8, 2, 1),
        mode="call",
        implementation="eager",
        is_backend=True,
        rounds=(3.0, 1.0, 2.0),
        bytes=10,
    )
    assert (row.microseconds, row.spread, row.bytes_per_second) == (2.0, 1.0, 5e6)


def test_settings_come_back_from_json():
    settings = Settings(
        routers=("gemma4", "mixtral"), sizes=((128, 8), (8, 2)), tokens=(1, 2), compare=()
    )
    assert Settings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    assert moe_routing.list_routers()["mixtral"]


@pytest.mark.slow
def test_the_figures_are_drawn_from_the_kept_runs(tmp_path):
    done = subprocess.run(
        [sys.executable, FIGURES, tmp_path], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    drawn = ("h200-kernels", "h200-torch", "expert-parallel")
    names = {f"{name}{theme}.svg" for name in drawn for theme in ("", "-dark")}
    assert (
        {path.name for path in tmp_path.iterdir()}
        == names
        <= {path.name for path in (ROOT / "docs" / "figures").iterdir()}
    )


def test_the_tables_of_the_pages_say_what_the_kept_runs_say():
    script = FIGURES.with_name("tables.py")
    done = subprocess.run(
        [sys.executable, script, "--check"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
