"""``moe_routing.plan`` as a user sees it.

What a plan must be is in the contract, which ``tests/conformance`` holds.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import moe_routing
from moe_routing._registry import registry
from moe_routing.cli._app import run as command
from moe_routing.doctor import examine
from moe_routing.planning import PlanProblem
from moe_routing_registry import RejectCode

E, K = 16, 4
PROBLEM = PlanProblem(num_experts=E, topk=K)

PLUGIN = """
from moe_routing_registry import BackendSpec, Target, hookimpl

CALLS = []

def build(problem, device):
    from moe_routing.reference.plan_oracle import plan

    def kernel(ids, out, *, capacity=None, weights=None):
        CALLS.append(problem)
        for part, given in zip(plan(problem, ids, capacity, weights), out):
            if part is not None:
                given.copy_(part)

    return kernel

@hookimpl
def moe_routing_backends():
    factories = {"plan": "planner:build"}
    return [BackendSpec(name="planner", factories=factories, targets=(Target("*"),))]
"""
WRECK = """
from moe_routing_registry import BackendSpec, Target, hookimpl

def build(problem, device):
    raise RuntimeError("no such chip")

@hookimpl
def moe_routing_backends():
    factories = {"plan": "wreck:build"}
    return [BackendSpec(name="wreck", factories=factories, targets=(Target("*"),), priority=900)]
"""


@pytest.fixture
def install(install_plugin, monkeypatch):
    """Return what installs a plug-in and loads it; the registry and the choices are new ones."""

    def installed(module, body):
        install_plugin(module, body)
        monkeypatch.setattr(registry(), "_inventory", None)
        monkeypatch.setattr("moe_routing.planning.call._calls", {})
        monkeypatch.setattr("moe_routing.planning.latest._kept", [None])
        return importlib.import_module(module)

    return installed


@pytest.fixture
def planner(install):
    """The module of a plug-in whose backend has a plan and nothing else."""
    return install("planner", PLUGIN)


def routed(tokens=12, **operands):
    route = moe_routing.get_router("mixtral")
    return route(torch.randn(tokens, E), K, **operands)


def pairs_of(made, expert):
    """Return the pairs of an expert, by the plan."""
    start, end = made.offsets[expert : expert + 2].tolist()
    return made.order[start:end].tolist()


def same(a, b):
    assert type(a) is type(b)
    for mine, its in zip(a, b, strict=True):
        assert (mine is None and its is None) or torch.equal(mine, its)


# After the router


def test_each_expert_gets_its_tokens_in_order():
    _, ids = routed()
    made = moe_routing.plan(ids, E)
    flat = ids.flatten().tolist()
    for expert in range(E):
        expected = [pair for pair, its in enumerate(flat) if its == expert]
        assert pairs_of(made, expert) == expected
        assert made.counts[expert] == len(expected)
    assert torch.equal(made.order[made.inverse.long()].flatten(), torch.arange(len(flat)))


def test_rows_that_only_pad_are_left_out():
    _, ids = routed(num_valid_tokens=5)
    made = moe_routing.plan(ids, E)
    assert made.counts.sum() == made.offsets[-1] == 5 * K
    _, valid = routed(num_valid_tokens=5)
    assert (made.inverse[5:] >= made.offsets[-1]).all()
    assert (moe_routing.plan(ids, E, block=8).inverse[5:] == -1).all()
    assert torch.equal(valid[5:], torch.full((7, K), -1, dtype=torch.int32))


def test_experts_of_other_ranks_are_left_out():
    """This rank has the second half of the experts."""
    here = torch.arange(E, dtype=torch.int32) - E // 2
    expert_map = torch.where(here < 0, -1, here)
    torch.manual_seed(5)
    _, logical = routed()
    torch.manual_seed(5)
    _, physical = routed(expert_map=expert_map)
    made = moe_routing.plan(physical, E // 2)
    everything = moe_routing.plan(logical, E)
    assert torch.equal(made.counts, everything.counts[E // 2 :])
    for expert in range(E // 2):
        assert pairs_of(made, expert) == pairs_of(everything, expert + E // 2)


# Which backend


def test_explain_names_the_winner_and_why_not_the_others():
    report = moe_routing.explain(PROBLEM)
    assert report.winner == "eager"
    assert report.rejection("torch-compile").verdict.code is RejectCode.EXPLICIT_ONLY
    fix = "with moe_routing.prefer('torch-compile'): ..."
    assert report.rejection("torch-compile").verdict.fix == fix
    assert report.to_dict()["problem"] == {
        "operation": "plan",
        "num_experts": E,
        "topk": K,
        "ids_dtype": "int32",
        "layout": "sorted",
        "block": 1,
        "drop": "nothing",
    }
    assert str(report).splitlines()[1].strip().startswith("for plan E=16 K=4 int32 on cpu")


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ({"num_experts": 5000}, "num_experts: expected an int from 1 to 4096, got 5000"),
        ({"topk": 0}, "topk: expected an int from 1 to 64, got 0"),
        ({"block": 2**31}, "block: expected an int from 1 to 2147483647, got 2147483648"),
    ],
)
def test_a_problem_of_another_size_than_plan_takes_is_refused(size, said):
    with pytest.raises(ValueError, match=said):
        PlanProblem(**{"num_experts": E, "topk": K, **size})


def test_a_backend_is_named_by_argument_block_or_variable(planner, monkeypatch):
    _, ids = routed()
    expected = moe_routing.plan(ids, E, block=8, backend="eager")
    assert not planner.CALLS
    same(moe_routing.plan(ids, E, block=8, backend="planner"), expected)
    assert [str(problem) for problem in planner.CALLS] == ["plan E=16 K=4 int32 block=8"]
    with moe_routing.prefer("planner"):
        same(moe_routing.plan(ids, E, block=8), expected)
        same(moe_routing.plan(ids, E, block=8, backend="eager"), expected)
    assert len(planner.CALLS) == 2
    same(moe_routing.plan(ids, E, block=8), expected)
    assert len(planner.CALLS) == 2, "it is chosen although nobody named it"
    monkeypatch.setenv("MOE_ROUTING_BACKEND", "planner")
    assert moe_routing.explain(PROBLEM).winner == "planner"
    ids = ids[:, :3]  # a kind of call that nothing has chosen for
    moe_routing.plan(ids, E)
    assert len(planner.CALLS) == 3


def test_an_unknown_backend_is_an_error_that_names_near_ones():
    _, ids = routed()
    with pytest.raises(moe_routing.UnknownNameError, match=r"'eagre': did you mean 'eager'"):
        moe_routing.plan(ids, E, backend="eagre")


@pytest.mark.usefixtures("planner")
def test_a_backend_that_only_plans_does_not_route():
    rejection = moe_routing.explain("mixtral").rejection("planner")
    assert rejection.verdict.code is RejectCode.OPERATION
    assert rejection.verdict.reason == (
        "has no factory for the operation 'route'; it computes plan"
    )
    with pytest.raises(moe_routing.BackendUnavailableError, match="planner"):
        moe_routing.get_router("mixtral", backend="planner")(torch.randn(2, E), K)


def test_a_factory_that_fails_costs_only_its_backend(install):
    """It has the highest priority, so the choice comes to it first."""
    install("wreck", WRECK)
    _, ids = routed()
    with pytest.warns(moe_routing.DowngradeWarning, match=r"wreck.*no such chip"):
        made = moe_routing.plan(ids, E)
    same(made, moe_routing.plan(ids, E, backend="eager"))
    with pytest.raises(moe_routing.BackendUnavailableError, match="no such chip"):
        moe_routing.plan(ids, E, backend="wreck")


# Tools


def test_doctor_says_who_plans():
    report = examine(device="cpu", checks=["backend"])
    (plans,) = [each for each in report["operations"] if each["name"] == "plan"]
    assert plans["backends"] == ["triton", "triton-xpu", "torch-compile", "eager"]
    assert plans["devices"]["cpu"] == {
        "problem": "plan E=128 K=8 int32",
        "winner": "eager",
        "why": "the best that fits this device",
    }


def test_the_command_line_lists_and_explains_plan(capsys):
    assert command(["list", "plan", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["operations"] == [
        {
            "name": "plan",
            "summary": "ids to the places of tokens grouped by expert",
            "backends": ["triton", "triton-xpu", "torch-compile", "eager"],
        }
    ]
    assert command(["explain", "plan", "-e", "64", "-k", "6"]) == 0
    out = capsys.readouterr().out
    assert "plan E=64 K=6 int32" in out
    assert "eager: the best that fits this device" in out
    assert command(["explain", "plan", "--backend", "eager", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["operation"], said["winner"]) == ("plan", "eager")
    assert said["problem"]["num_experts"] == 128


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-e", "5000"], "--num-experts: expected an int from 1 to 4096, got 5000"),
        (["--dtype", "float32"], "--dtype: the operation 'plan' has none"),
        (["--backend", "eagre"], "unknown backend 'eagre': did you mean 'eager'?"),
    ],
)
def test_wrong_options_of_explain_plan_are_wrong_usage(capsys, options, said):
    assert command(["explain", "plan", *options]) == 2
    assert said in capsys.readouterr().err


def test_importing_the_problem_imports_no_torch():
    script = (
        "import sys, moe_routing.planning as p; p.PlanProblem(num_experts=8, topk=2);"
        "import moe_routing; moe_routing.DispatchPlan;"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


# Compilers


def step(logits):
    """Route and plan, with rows that only pad."""
    weights, ids = moe_routing.get_router("mixtral")(logits, K, num_valid_tokens=2)
    return weights, moe_routing.plan(ids, E, block=8, capacity=3)


@pytest.mark.slow
def test_route_and_plan_compile_as_one_graph():
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=graphs, dynamic=True)
    compiled_so_far = []
    for tokens in (7, 12, 3):  # more pairs than experts, and fewer
        logits = torch.randn(tokens, E)
        weights, made = compiled(logits)
        expected, plan = step(logits)
        assert torch.equal(weights, expected)
        same(made, plan)
        compiled_so_far.append(graphs.frame_count)
    assert len(set(compiled_so_far)) == 1, "a number of tokens is compiled again"


def test_route_and_plan_export(tmp_path):
    class Step(torch.nn.Module):
        def forward(self, logits):
            return step(logits)

    tokens = torch.export.Dim("tokens", min=2, max=512)
    program = torch.export.export(Step(), (torch.randn(7, E),), dynamic_shapes=({0: tokens},))
    torch.export.save(program, tmp_path / "step.pt2")
    loaded = torch.export.load(tmp_path / "step.pt2").module()
    for count in (12, 3):  # more pairs than experts, and fewer
        logits = torch.randn(count, E)
        weights, made = loaded(logits)
        expected, plan = step(logits)
        assert torch.equal(weights, expected)
        same(made, plan)
