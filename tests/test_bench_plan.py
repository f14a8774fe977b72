"""``moe-routing bench plan``: the dispatch plans of backends against those of a sort in PyTorch."""

from __future__ import annotations

import csv
import io
import json

import pytest
import torch

from moe_routing import DispatchPlan
from moe_routing.bench import PLAN_COMPARISONS, PlanCase, PlanSettings, Result, _clock
from moe_routing.bench._clock import refusal
from moe_routing.bench.plan._check import problems
from moe_routing.bench.plan._implementations import backend, comparison
from moe_routing.bench.plan._inputs import make
from moe_routing.cli._app import run
from moe_routing.formula import plan as formula
from moe_routing.reference import plan_oracle
from moe_routing_registry import BackendSpec, Target

CPU = torch.device("cpu")
SHORT = "bench plan --device cpu --num-experts 32 --topk 4 --backend eager"
MEASURED = 7.0
"""Microseconds that every call takes by the clock of these tests."""


@pytest.fixture
def cli(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")

    def call(line):
        code = run(line.split())
        return code, *capsys.readouterr()

    return call


@pytest.fixture(autouse=True)
def _steady_clock(monkeypatch):
    """Run what is to be timed, and say that it took the same time."""

    def call(work, _device):
        work()
        return MEASURED

    monkeypatch.setattr(_clock, "call", call)


@pytest.fixture
def kept(cli, tmp_path):
    """Write a run as `bench --json` prints it, with a change."""

    def write(options="--tokens 1,16", change=lambda _held: None):
        code, out, _ = cli(f"{SHORT} --json {options}")
        assert code == 0
        held = json.loads(out)
        change(held)
        path = tmp_path / "run.json"
        path.write_text(json.dumps(held))
        return path

    return write


def every_round(microseconds):
    def change(held):
        for row in held["rows"]:
            row["rounds"] = [microseconds] * 5

    return change


def test_a_run_holds_the_operation_the_problem_and_every_implementation(kept):
    held = json.loads(kept().read_text())
    assert held["operation"] == "plan"
    assert [(row["tokens"], row["implementation"], row["is_backend"]) for row in held["rows"]] == [
        (tokens, name, is_backend)
        for tokens in (1, 16)
        for name, is_backend in (("eager", True), ("sort", False), ("sort-int32", False))
    ]
    for row in held["rows"]:
        assert (row["num_experts"], row["topk"], row["block"]) == (32, 4, None)
        assert (row["microseconds"], len(row["rounds"])) == (MEASURED, 5)
    # The ids, the pairs, their places; the counts; the offsets.
    assert held["rows"][-1]["bytes"] == 4 * (3 * 16 * 4 + 32 + 33)


@pytest.mark.parametrize("options", ["--tokens 1,16", "--tokens 3 --block 16 --compare none"])
def test_a_run_reads_back_as_it_was_written(kept, options):
    path = kept(options)
    assert Result.read(path).to_dict() == json.loads(path.read_text())


@pytest.mark.slow
def test_every_backend_that_plans_is_measured_where_none_is_named(cli):
    code, out, _ = cli("bench plan --device cpu --tokens 1 --compare none --json")
    rows = json.loads(out)["rows"]
    assert code == 0
    assert [row["implementation"] for row in rows] == ["torch-compile", "eager"]


def test_the_table_names_problem_and_implementations(cli):
    code, out, err = cli(f"{SHORT} --tokens 1 --block 64")
    assert (code, err) == (0, "")
    assert "plan, int32 ids, E = 32, K = 4, blocks of 64, mode call" in out
    for label in ("backend: eager", "comparison: sort ", "comparison: sort-int32"):
        assert label in out


def test_csv_has_a_line_for_every_row(cli):
    code, out, _ = cli(f"{SHORT} --tokens 1,16 --block 8 --csv --compare sort")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 0
    assert [(row["tokens"], row["block"], row["implementation"]) for row in rows] == [
        ("1", "8", "eager"),
        ("1", "8", "sort"),
        ("16", "8", "eager"),
        ("16", "8", "sort"),
    ]


@pytest.mark.slow
def test_a_plot_is_a_page_with_a_drawing(cli, tmp_path):
    code, _, _ = cli(f"{SHORT} --tokens 1,16 --plot {tmp_path}/a.html --plot {tmp_path}/a.png")
    page = (tmp_path / "a.html").read_text()
    assert code == 0
    assert "<h2>plan, int32 ids, E = 32, K = 4, mode call</h2>" in page
    assert page.count("<img src='data:image/svg+xml;base64,") == 1
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", PLAN_COMPARISONS)
@pytest.mark.parametrize("block", [None, 1, 7, 64])
@pytest.mark.parametrize(("num_experts", "topk", "tokens"), [(8, 2, 1), (64, 8, 300), (5, 5, 9)])
def test_a_sort_in_pytorch_plans_what_the_oracle_plans(name, block, num_experts, topk, tokens):
    inputs = make(PlanCase(num_experts, topk, block, tokens), CPU, 1)
    assert problems(comparison(name, inputs), inputs) == []


def test_the_ids_of_a_token_differ_and_those_of_sets_too():
    inputs = make(PlanCase(8, 4, None, 100), CPU, 1)
    assert inputs.given[0].sort(-1).values.diff(dim=-1).min() >= 1
    assert len(inputs.given) == len(inputs.outs)
    assert not torch.equal(inputs.given[0], inputs.given[1])


@pytest.mark.parametrize(("tokens", "asked"), [(100, plan_oracle), (5_000, formula)])
def test_the_oracle_says_what_is_right_and_the_formula_for_many_tokens(monkeypatch, tokens, asked):
    calls = []
    for module in (plan_oracle, formula):
        right = module.plan
        monkeypatch.setattr(
            module, "plan", lambda *a, module=module, right=right: calls.append(module) or right(*a)
        )
    make(PlanCase(16, 8, 4, tokens), CPU, 1)
    assert calls == [asked]


WRONG = """
from moe_routing_backends.eager.plan import build as right

def build(problem, device):
    fill = right(problem, device)
    def spoilt(ids, out, **more):
        {before}
        fill(ids, out, **more)
        {after}
    return spoilt
"""


@pytest.fixture
def spoilt(tmp_path, monkeypatch):
    """Register the eager backend with lines before and after its own, under another name."""
    from moe_routing._registry import registry

    monkeypatch.syspath_prepend(str(tmp_path))
    registered = []

    def register(after, before="pass"):
        name = f"spoilt_{tmp_path.name.replace('-', '_')}"
        (tmp_path / f"{name}.py").write_text(WRONG.format(before=before, after=after))
        registry().register(
            BackendSpec(name=name, factories={"plan": f"{name}:build"}, targets=(Target("cpu"),))
        )
        registered.append(name)
        return name

    yield register
    for name in registered:
        registry().unregister(name)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("out.order[:2] = out.order[:2].flip(0)", "order: element 0 is not the reference's"),
        ("out.inverse[-1, -1] += 1", "inverse: element 63 is not the reference's"),
        ("out.counts[31] += 1", "counts: element 31 is not the reference's"),
        ("out.offsets[-1] += 1", "offsets: element 32 is not the reference's"),
        ("out.block_experts[-1] = 31", "block_experts: element 35 is not the reference's"),
        ("raise RuntimeError('no memory')", "raised RuntimeError: no memory"),
    ],
)
def test_a_wrong_backend_gets_no_number_and_exit_code_1(cli, spoilt, line, said):
    name = spoilt(line)
    code, out, _ = cli(f"{SHORT} --tokens 16 --block 8 --backend {name} --compare none --json")
    right, wrong = json.loads(out)["rows"]
    assert code == 1
    assert (wrong["implementation"], wrong["microseconds"], wrong["rounds"]) == (name, None, [])
    assert any(said in sentence for sentence in wrong["wrong"])
    assert right["microseconds"] == MEASURED


def test_parts_that_are_not_written_are_seen_although_memory_holds_the_right_answer():
    inputs = make(PlanCase(8, 2, 4, 10), CPU, 1)
    right = backend("eager", inputs)
    right.into(inputs.given[0], inputs.outs[0])
    found = problems(right._replace(into=lambda _ids, _out: None), inputs)
    assert [sentence.partition(":")[0] for sentence in found] == [*DispatchPlan._fields[:5]]


def test_outputs_that_the_implementation_allocates_are_compared_too():
    inputs = make(PlanCase(8, 2, None, 10), CPU, 1)
    right = backend("eager", inputs)
    other = right._replace(call=lambda ids: right.call(ids.flip(0)))
    assert problems(right, inputs) == []
    assert problems(other, inputs) == [
        "with outputs that it allocates itself it computes something else"
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda made: made._replace(order=made.order[:-1]), "order: shape [19], the reference has"),
        (lambda made: made._replace(block_experts=made.counts), "block_experts: a tensor, the"),
        (lambda made: made._replace(counts=None), "counts: None, the reference has a tensor"),
        (lambda made: made._replace(counts=made.counts.long()), "counts: torch.int64, the"),
    ],
)
def test_shapes_dtypes_and_missing_parts_are_seen(change, said):
    inputs = make(PlanCase(8, 2, None, 10), CPU, 1)
    right = backend("eager", inputs)
    (found,) = problems(right._replace(into=None, call=lambda ids: change(right.call(ids))), inputs)
    assert found.startswith(said)


def test_a_comparison_is_not_captured_in_a_graph_since_it_waits_for_the_device():
    inputs = make(PlanCase(8, 2, None, 2), CPU, 1)
    assert "bincount waits for the device" in refusal("graph", comparison("sort", inputs))
    assert refusal("call", comparison("sort", inputs)) == ""
    assert refusal("graph", backend("eager", inputs)) == ""


def test_against_a_slower_run_is_exit_code_0(cli, kept):
    slow = kept("--tokens 1,16 --block 8", every_round(2 * MEASURED))
    code, out, _ = cli(f"bench --against {slow} --json")
    held = json.loads(out)
    assert (code, held["losses"]) == (0, [])
    assert held["operation"] == "plan"
    assert {row["block"] for row in held["rows"]} == {8}


def test_against_a_faster_run_is_exit_code_1_and_says_which(cli, kept):
    def first_alone(held):
        every_round(2 * MEASURED)(held)
        held["rows"][0]["rounds"] = [MEASURED / 2] * 5

    code, out, _ = cli(f"bench plan --against {kept(change=first_alone)}")
    assert code == 1
    assert "slower: plan E=32 K=4 int32 T=1 call backend: eager: " in out
    assert out.endswith("2 configurations compared, 1 slower than the noise of both runs\n")


@pytest.mark.parametrize(
    ("change", "command", "said"),
    [
        (lambda _held: None, "bench route", "expected a run of route, got one of plan"),
        (lambda _held: None, "bench plan --tokens 3", "got one without plan E=32 K=4 int32 T=3"),
        (lambda _held: None, "bench plan --block 4", "got one without plan E=32 K=4 int32 block=4"),
        (lambda held: held.update(operation="sing"), "bench", "route or plan, got one of 'sing'"),
        (lambda held: held["settings"].update(topk="8"), "bench", "topk: expected an int, got '8'"),
        (lambda held: held["settings"].update(num_experts=0), "bench", "num_experts: expected an"),
    ],
)
def test_against_another_run_is_exit_code_2(cli, kept, change, command, said):
    code, out, err = cli(f"{command} --against {kept(change=change)}")
    assert (code, out) == (2, "")
    assert err.startswith("moe-routing: --against: ")
    assert said in err


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ("plam", 2, "operation: expected one of route, plan, got 'plam'"),
        ("plan --dtype bf16", 2, "--dtype: the operation 'plan' has none"),
        ("plan --router gemma4", 2, "--router: the operation 'plan' has none"),
        ("route --block 8", 2, "--block: the operation 'route' has none"),
        ("--block 8", 2, "--block: the operation 'route' has none"),
        ("plan --experts 5000", 2, "--num-experts: expected an int from 1 to 4096, got 5000"),
        ("plan --topk 65", 2, "--topk: expected an int from 1 to 64, got 65"),
        ("plan --experts 4", 2, "--topk: expected 1 <= topk <= num_experts (4), got 8"),
        ("plan --tokens 1,x", 2, "--tokens: expected an integer >= 1, got 'x'"),
        ("plan --compare eager", 2, "--compare: expected one of sort, sort-int32, got 'eager'"),
        ("plan --mode graph", 2, "--mode: expected call on the CPU"),
        ("plan --backend eagre", 2, "unknown backend 'eagre': did you mean 'eager'?"),
        ("plan --backend triton", 1, "backend 'triton' cannot be used here"),
        ("plan --device cuda:7", 1, "device: 'cuda:7' is not on this machine"),
        (
            "plan --tokens 300000000",
            2,
            "--tokens: expected a plan of at most 2147483647 places, got plan E=128 K=8 int32 T=",
        ),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is(cli, options, code, said):
    found, out, err = cli(f"bench --device cpu {options}")
    assert (found, out) == (code, "")
    assert said in err


def test_a_problem_beyond_the_memory_of_the_device_is_refused(cli):
    code, out, err = cli("bench plan --device cpu --num-experts 4096 --topk 1 --tokens 2147483000")
    assert (code, out) == (2, "")
    assert "--tokens: expected a problem that fits " in err


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"num_experts": 8.0}, "num_experts: expected an int, got 8.0"),
        ({"topk": True}, "topk: expected an int, got True"),
        ({"block": 0}, "block: expected an int from 1 to 2147483647, got 0"),
        ({"block": "64"}, "block: expected an int, got '64'"),
        ({"tokens": ()}, "tokens: expected integers >= 1"),
        ({"compare": ("eager",)}, "compare: expected one of sort, sort-int32, got 'eager'"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(values, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        PlanSettings(**values)


def test_settings_come_back_from_json():
    settings = PlanSettings(num_experts=64, topk=6, block=128, tokens=(1, 2), compare=())
    assert PlanSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
