"""An operation from outside.

It is registered with its oracle, resolved on two backends, and checked by a clause of its own.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

import moe_routing
from moe_routing._registry import registry
from moe_routing.cli._app import run as command
from moe_routing.conformance import run
from moe_routing.doctor import examine
from moe_routing.report import Gathered, _gather, to_html
from moe_routing_registry import RejectCode, Request, UnknownNameError

PLUGIN = """
from dataclasses import dataclass
from typing import ClassVar

from moe_routing_registry import BackendSpec, OperationSpec, RejectCode, Target, Verdict, hookimpl

@dataclass(frozen=True)
class CopyProblem:
    operation: ClassVar[str] = "scaled_copy"
    family: ClassVar[str] = ""
    size: int
    def to_dict(self):
        return {"operation": self.operation, "size": self.size}
    def __str__(self):
        return f"{self.size} numbers"

EXAMPLE = CopyProblem(4)

def double(problem, device):
    return lambda x: x * 2

def add(problem, device):
    return lambda x: x + x

def triple(problem, device):
    return lambda x: x * 3

def supports(problem, device):
    too_many = Verdict.no(RejectCode.SHAPE, "copies up to 8 numbers")
    return Verdict.yes() if problem.size <= 8 else too_many

@hookimpl
def moe_routing_operations():
    return [
        OperationSpec(
            name="scaled_copy", example="copying:EXAMPLE", oracle="copying_kit:oracle",
            contract="copying_kit:CONTRACT", summary="twice each number",
        )
    ]

@hookimpl
def moe_routing_backends():
    def backend(name, priority, **more):
        factories = {"scaled_copy": f"copying:{name}"}
        targets = (Target("*"),)
        return BackendSpec(
            name=name, factories=factories, targets=targets, priority=priority, **more
        )

    return [backend("double", 3, supports=supports), backend("add", 2), backend("triple", 1)]
"""

KIT = """
from dataclasses import dataclass

import torch

from moe_routing.conformance import Clause, Contract

import copying

def oracle(x):
    return 2 * x.double()

@dataclass(frozen=True)
class Case:
    size: int
    family = ""
    @property
    def id(self):
        return str(self.size)

CLAUSES = {
    1: Clause(1, "exact", "Exact", "Each number is doubled, exactly.",
              "Each number is doubled, exactly.", "an example."),
}
CONTRACT = Contract(CLAUSES, problems=lambda: [copying.EXAMPLE])

@CONTRACT.check(1, cases=lambda profile: [Case(3), Case(70)])
def numbers_are_doubled(under_test, case):
    # Numbers are doubled.
    x = torch.randn(case.size)
    if not torch.equal(under_test.kernel(copying.CopyProblem(case.size))(x).double(), oracle(x)):
        raise AssertionError(f"{case.size} numbers are not doubled")
"""


@pytest.fixture
def copying(install_plugin, monkeypatch):
    """The plug-in's module; the process's registry is a new one, which has loaded it."""
    site = install_plugin("copying", PLUGIN)
    (site / "copying_kit.py").write_text(KIT)
    monkeypatch.setattr(registry(), "_inventory", None)
    yield importlib.import_module("copying")
    importlib.sys.modules.pop("copying_kit", None)


def test_backends_of_an_operation_are_chosen_by_the_same_rules(copying):
    report = moe_routing.explain(copying.CopyProblem(4))
    assert (report.winner, [c.name for c in report.eligible]) == (
        "double",
        ["double", "add", "triple"],
    )
    assert report.to_dict()["problem"] == {"operation": "scaled_copy", "size": 4}
    assert report.rejection("eager").verdict.code is RejectCode.OPERATION
    assert (
        report.rejection("eager").verdict.reason
        == "has no factory for the operation 'scaled_copy'; "
        "it computes route, gate, plan, permute, combine, balance"
    )
    assert moe_routing.explain(copying.CopyProblem(9)).winner == "add"
    assert moe_routing.explain(copying.CopyProblem(4), backend="triple").winner == "triple"
    routed = moe_routing.explain("gemma4")
    assert routed.to_dict()["problem"]["operation"] == "route"
    assert routed.rejection("double").verdict.code is RejectCode.OPERATION


@pytest.mark.parametrize("name", ["double", "add"])
def test_a_backend_builds_its_kernel_for_the_operation(copying, name):
    import torch

    problem, device = copying.CopyProblem(3), moe_routing.probe("cpu")
    assert (
        registry().resolve(problem, device, Request(backend=name, asked_by="argument")).winner
        == name
    )
    assert registry().build(name, problem, device)(torch.tensor([1.0, 2.0, 3.0])).tolist() == [
        2.0,
        4.0,
        6.0,
    ]


@pytest.mark.usefixtures("copying")
def test_the_kit_holds_backends_to_the_contract_of_the_operation():
    doubles, adds, triples = (
        run(name, operation="scaled_copy") for name in ("double", "add", "triple")
    )
    assert doubles.operation == "scaled_copy"
    assert doubles.verdict == "conforms: 1 checked, 1 declined (copies up to 8 numbers: 1)"
    assert adds.verdict == "conforms: 2 checked"
    assert {r.message for r in triples.failed} == {
        "3 numbers are not doubled",
        "70 numbers are not doubled",
    }
    assert doubles.to_dict()["clauses"] == {
        "1": {"name": "exact", "rule": "Each number is doubled, exactly."}
    }


@pytest.mark.usefixtures("copying")
def test_the_commands_go_by_the_operation(capsys):
    assert command(["conformance", "add", "--operation", "scaled_copy"]) == 0
    assert "Each number is doubled, exactly." in capsys.readouterr().out
    assert command(["conformance", "add", "--operation", "scaled_copy", "--clause", "2"]) == 2
    assert "--clause: expected one of 1, got 2" in capsys.readouterr().err
    assert command(["conformance", "add", "--operation", "scale_copy"]) == 2
    assert "unknown operation 'scale_copy': did you mean 'scaled_copy'?" in " ".join(
        capsys.readouterr().err.split()
    )


@pytest.mark.usefixtures("copying")
def test_a_backend_without_the_operation_is_not_checked(capsys):
    assert command(["conformance", "eager", "--operation", "scaled_copy"]) == 2
    assert "has no factory for the operation 'scaled_copy'" in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.usefixtures("copying")
def test_doctor_lists_operations_and_who_computes_them(capsys):
    report = examine(device="cpu", checks=["backend"])
    *ours, copied = report["operations"]
    assert [(one["name"], one["devices"]["cpu"]["winner"]) for one in ours] == [
        ("route", "eager"),
        ("gate", "eager"),
        ("plan", "eager"),
        ("permute", "eager"),
        ("combine", "eager"),
        ("exchange", "all-to-all"),
        ("balance", "eager"),
    ]
    assert copied == {
        "name": "scaled_copy",
        "summary": "twice each number",
        "backends": ["double", "add", "triple"],
        "devices": {
            "cpu": {
                "problem": "4 numbers",
                "winner": "double",
                "why": "the best that fits this device",
            }
        },
    }
    assert next(b for b in report["backends"] if b["name"] == "add")["operations"] == [
        "scaled_copy"
    ]
    command(["doctor", "--device", "cpu"])
    assert "scaled_copy" in capsys.readouterr().out


@pytest.mark.usefixtures("copying")
def test_the_report_says_how_to_check_it():
    doctor = examine(device="cpu")
    assert "scaled_copy" not in _gather._winners(doctor, "cpu")
    page = to_html(Gathered(doctor=doctor, device="cpu", operations={}))
    command = "moe-routing conformance double --operation scaled_copy --device cpu"
    (line,) = [line for line in page.splitlines() if "scaled_copy --device" in line]
    assert command in line


def test_what_is_for_another_operation_is_kept_and_not_told():
    report = moe_routing.explain("gemma4")
    assert report.rejection("all-to-all").verdict.code is RejectCode.OPERATION
    assert "all-to-all" in {rejected["name"] for rejected in report.to_dict()["rejected"]}
    assert {rejected.name for rejected in report.considered} >= {"triton", "torch-compile"}
    assert "has no factory" not in str(report)
    assert "not triton: is for cuda and rocm, the device is cpu [platform]" in str(report)


def test_what_was_named_is_told_whatever_it_computes(capsys):
    said = "has no factory for the operation 'route'; it computes exchange"
    report = moe_routing.explain("gemma4", backend="all-to-all")
    assert [line for line in str(report).splitlines() if "has no factory" in line] == [
        f"  not all-to-all: {said} [operation]"
    ]
    assert command(["explain", "gemma4", "--backend", "all-to-all"]) == 1
    shown = capsys.readouterr().out
    assert said in shown
    assert "all-reduce" not in shown
    assert command(["explain", "gemma4"]) == 0
    assert "all-" not in capsys.readouterr().out


def test_what_names_a_backend_that_computes_names_no_transport(monkeypatch):
    """As ``ExpertParallel`` chooses; its argument is asked, and so is what is blocked."""
    problem = registry().example("exchange")
    monkeypatch.setenv("MOE_ROUTING_BACKEND", "eager")
    assert moe_routing.explain(problem).winner == "all-to-all"
    with moe_routing.prefer("eager"):
        assert moe_routing.explain(problem).asked_by == "probe"
    assert moe_routing.explain(problem, backend="all-reduce").requested == "all-reduce"
    monkeypatch.setenv("MOE_ROUTING_BLOCK", "all-to-all")
    assert moe_routing.explain(problem).winner is None


def test_doctors_table_for_a_router_has_only_backends_that_route(capsys):
    assert command(["doctor", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    routing = shown.partition("Backends for gemma4")[2].partition("Operations")[0]
    assert "torch-compile" in routing
    assert "all-" not in routing
    assert "all-to-all" in shown.partition("Operations")[2]
    assert {"all-to-all", "all-reduce"} <= {b["name"] for b in examine(device="cpu")["backends"]}


def test_list_names_the_backends_of_each_operation_best_first(capsys):
    assert command(["list", "exchange"]) == 0
    assert "backends: symmetric, all-reduce, all-to-all" in capsys.readouterr().out


def test_an_unknown_operation_is_an_error_and_near_names_are_named(copying):
    problem = type("Problem", (copying.CopyProblem,), {"operation": "scale_copy"})(3)
    with pytest.raises(
        UnknownNameError, match="unknown operation 'scale_copy': did you mean 'scaled_copy'"
    ):
        registry().resolve(problem, moe_routing.probe("cpu"), Request())


def test_an_operation_s_name_belongs_to_who_brought_it(install_plugin, monkeypatch):
    install_plugin("copying", PLUGIN.replace('name="scaled_copy"', 'name="route"'))
    monkeypatch.setattr(registry(), "_inventory", None)
    with pytest.warns(
        moe_routing.PluginWarning,
        match="'route' is the name of an operation of moe-routing already",
    ):
        assert "double" not in registry().backends


def test_the_example_of_an_operation_is_chosen_and_conforms(install_plugin, monkeypatch):
    example = Path(__file__).parents[1] / "examples" / "scaled_copy.py"
    install_plugin("scaled_copy", example.read_text())
    monkeypatch.setattr(registry(), "_inventory", None)
    module = importlib.import_module("scaled_copy")
    assert moe_routing.explain(module.CopyProblem(1000)).winner == "double"
    assert moe_routing.explain(module.CopyProblem(1001)).winner == "add"
    for name in ("double", "add"):
        report = run(name, operation="scaled_copy")
        assert report.ok
        assert [result.status for result in report.results] == ["passed"] * 2
