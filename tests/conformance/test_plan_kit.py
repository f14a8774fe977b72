"""The eager backend conforms in ``plan``, by every entry point."""

import random
import subprocess
import sys

import pytest
from mutants import Mutant, registered
from mutants.planning import Reference

from moe_routing._registry import registry
from moe_routing.cli._app import run as command
from moe_routing.conformance import run
from moe_routing.conformance.contract import contract_of
from moe_routing.conformance.plan_clauses import CLAUSES
from moe_routing.conformance.runner import backend_under_test, evaluate
from moe_routing_registry import BackendSpec, RejectCode, Target, Verdict

COMPILES = 9
"""Checks of this clause take seconds in the smallest profile too: its cases are tried with more."""


@pytest.mark.parametrize(
    ("clause", "profile"),
    [
        *((clause, "smoke") for clause in CLAUSES if clause != COMPILES),
        *(pytest.param(clause, "quick", marks=pytest.mark.slow) for clause in CLAUSES),
    ],
)
def test_eager_conforms(clause, profile):
    seed = random.getrandbits(32)
    report = run("eager", operation="plan", profile=profile, clauses=[clause], seed=seed)
    assert [(result.id, result.message) for result in report.failed] == []
    assert report.ok
    assert report.count("declined") == 0


def test_the_command_checks_the_operation(capsys):
    assert command(["conformance", "eager", "--operation", "plan", "--clause", "5"]) == 0
    printed = capsys.readouterr().out
    assert CLAUSES[5].rule.partition(",")[0] in printed
    assert "eager conforms: " in printed
    assert command(["conformance", "eager", "--operation", "plan", "--clause", "11"]) == 2
    assert "--clause: expected one of 0, 1, 2," in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_pytest_holds_a_named_backend_to_the_operation_that_is_named():
    words = ["--pyargs", "moe_routing.conformance", "--moe-backend", "eager"]
    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            *words,
            "--moe-operation",
            "plan",
            "-k",
            "test_03_blocks and T1",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout
    assert "9 passed" in ran.stdout


def sorted_only(problem, device):
    del device
    return (
        Verdict.yes()
        if problem.layout == "sorted"
        else Verdict.no(RejectCode.LAYOUT, "has no empty places")
    )


def blocks_declined(problem, device):
    return sorted_only(problem, device) if problem.operation == "plan" else Verdict.yes()


GAPS_ARE_REAL = "a_declared_gap_is_real"


def declining(**gaps):
    """Return a context of a backend that declines blocks and the masked layout."""
    return registered(Mutant(Reference, "", supports=sorted_only, operation="plan", gaps=gaps))


def test_declining_a_layout_with_a_reason_in_the_spec_is_no_failure():
    with declining(layout="blocks are left to eager") as name:
        report = run(name, operation="plan", profile="smoke", clauses=[0, 3])
    assert report.ok
    assert "(has no empty places: " in report.verdict
    assert report.gaps == {"layout": "blocks are left to eager"}


def test_a_gap_of_plans_is_real_for_the_router_of_the_same_backend_too():
    factories = {"route": "mutants:Reference", "plan": "mutants.planning:Reference"}
    spec = BackendSpec(
        name="both", factories=factories, targets=(Target("cpu"),), supports=blocks_declined,
        gaps={"layout": "blocks are left to eager", "shape": "any", "cuda_graphs": "never tried"},
    )  # fmt: skip
    registry().register(spec)
    try:
        under_test = backend_under_test("both", "cpu")
        for operation in factories:
            (check,) = (c for c in contract_of(operation).checks if c.name == GAPS_ARE_REAL)
            found = {r.case: r for r in (evaluate(i, under_test) for i in check.items("smoke"))}
            assert found["layout"].status == "passed"
            assert found["shape"].message == "declares a gap in shape, but declines nothing for it"
            assert found["cuda_graphs"].message == "cuda_graphs cannot be tried here"
    finally:
        registry().unregister("both")


def test_declining_a_layout_that_could_be_had_fails():
    with declining() as name:
        report = run(name, operation="plan", profile="smoke", clauses=[0])
    assert {result.check for result in report.failed} == {"what_it_declines_cannot_be_planned"}
    assert "but gets it right; accept it, or give a reason under gaps['layout']" in {
        result.message.partition("), ")[2] for result in report.failed
    }


def test_a_backend_without_a_factory_for_plans_is_not_checked(capsys):
    targets, factories = (Target("cpu"),), {"route": "mutants:Reference"}
    registry().register(BackendSpec(name="router-only", factories=factories, targets=targets))
    try:
        assert command(["conformance", "router-only", "--operation", "plan"]) == 2
    finally:
        registry().unregister("router-only")
    assert "has no factory for the operation 'plan'; it computes route" in " ".join(
        capsys.readouterr().out.split()
    )
