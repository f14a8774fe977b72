"""The eager backend conforms in ``permute`` and ``combine``, by every entry point."""

import itertools
import random
import subprocess
import sys

import pytest
import torch
from mutants import Mutant, registered
from mutants.permutation import Permutes

from moe_routing._registry import registry
from moe_routing.cli._app import run as command
from moe_routing.conformance import run
from moe_routing.conformance.contract import contract_of
from moe_routing.planning import PlanProblem
from moe_routing.reference import permutation_oracle, plan_oracle
from moe_routing_registry import BackendSpec, RejectCode, Target, Verdict

OPERATIONS = ("permute", "combine")
COMPILES = 9
"""The clause whose checks take seconds in the smallest profile too."""


@pytest.mark.parametrize(
    ("operation", "clause", "profile"),
    [
        pytest.param(
            operation,
            clause,
            profile,
            marks=[pytest.mark.slow] * (profile == "quick" or clause == COMPILES),
        )
        for operation in OPERATIONS
        for clause, profile in itertools.product(contract_of(operation).clauses, ("smoke", "quick"))
    ],
)
def test_eager_conforms(operation, clause, profile):
    seed = random.getrandbits(32)
    report = run("eager", operation=operation, profile=profile, clauses=[clause], seed=seed)
    assert [(result.id, result.message) for result in report.failed] == []
    assert report.ok
    assert report.count("declined") == 0


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_command_checks_the_operation(capsys, operation):
    clauses = contract_of(operation).clauses
    assert command(["conformance", "eager", "--operation", operation, "--clause", "2"]) == 0
    printed = capsys.readouterr().out
    assert clauses[2].rule.partition(",")[0] in " ".join(printed.split())
    assert "eager conforms: " in printed
    assert command(["conformance", "eager", "--operation", operation, "--clause", "11"]) == 2
    assert "--clause: expected one of 0, 1, 2," in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operation", "chosen", "passed"),
    [
        ("permute", "test_02_empty_places and blocks", ""),
        ("permute", "test_03_quantized and T33 and infinite", "6 passed"),
        ("combine", "test_02_pairs_without_a_place and matrix", "12 passed"),
    ],
)
def test_pytest_holds_a_named_backend_to_the_operation_that_is_named(operation, chosen, passed):
    words = ["--pyargs", "moe_routing.conformance", "--moe-backend", "eager"]
    options = ["--moe-operation", operation, "-k", chosen]
    plain = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    ran = subprocess.run([*plain, *words, *options], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout
    assert passed in ran.stdout


def without_blocks(problem, device):
    del device
    blocks = getattr(problem, "layout", "") == "blocks"
    return Verdict.no(RejectCode.LAYOUT, "has no blocks") if blocks else Verdict.yes()


def declining(**gaps):
    """Return a context of a backend that declines to permute into blocks."""
    return registered(Mutant(Permutes, "", supports=without_blocks, operation="permute", gaps=gaps))


def test_declining_a_layout_with_a_reason_in_the_spec_is_no_failure():
    with declining(layout="blocks are left to eager") as name:
        report = run(name, operation="permute", profile="smoke", clauses=[0, 2])
    assert report.ok
    assert "(has no blocks: " in report.verdict
    assert report.gaps == {"layout": "blocks are left to eager"}


def test_declining_a_layout_that_could_be_had_fails():
    with declining() as name:
        report = run(name, operation="permute", profile="smoke", clauses=[0])
    assert {result.check for result in report.failed} == {"what_it_declines_fails"}
    assert all(
        "but gets it right; accept it, or give a reason under gaps['layout']" in result.message
        for result in report.failed
    )


def test_a_backend_that_only_permutes_has_gradients_and_is_not_held_to_combine(capsys):
    factories = {"permute": "mutants.permutation:Permutes"}
    registry().register(
        BackendSpec(name="permutes-only", factories=factories, targets=(Target("cpu"),))
    )
    try:
        report = run("permutes-only", operation="permute", profile="smoke", clauses=[8])
        assert command(["conformance", "permutes-only", "--operation", "combine"]) == 2
    finally:
        registry().unregister("permutes-only")
    assert report.verdict == f"conforms: {report.count('passed')} checked"
    assert "has no factory for the operation 'combine'; it computes permute" in " ".join(
        capsys.readouterr().out.split()
    )


def planned(ids, **layout):
    topk, experts = ids.shape[1], int(ids.max()) + 1
    return plan_oracle.plan(PlanProblem(num_experts=experts, topk=topk, **layout), ids)


def test_the_oracle_rounds_to_float8_as_torch_does():
    values = torch.cat(
        (torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16).float(),
         torch.linspace(-448, 448, 9999))
    )  # fmt: skip
    values = values[values.isnan() | (values.abs() <= 448)]
    ours, torchs = (
        rounded.float() for rounded in (
            permutation_oracle.to_float8(values.double()), values.to(torch.float8_e4m3fn)
        )
    )  # fmt: skip
    assert torch.equal(ours.nan_to_num(7.0), torchs.nan_to_num(7.0))
    assert torch.equal(ours.signbit() | ours.isnan(), torchs.signbit() | torchs.isnan())


def test_the_oracle_of_sums_leaves_room_for_a_fused_product_and_for_nothing_else():
    plan = planned(torch.tensor([[0, 1]]))
    weights = torch.tensor([[1.0, 1 + 2.0**-12]])
    rows = torch.tensor([[-1.0 - 2.0**-11], [1 + 2.0**-12]])  # a product of 1 + 2**-11 + 2**-24
    between = permutation_oracle.combine(rows, plan, weights)
    assert (between.least.item(), between.greatest.item()) == (0.0, 2.0**-24)


def test_the_oracle_of_sums_follows_the_order_of_the_slots_through_overflow():
    plan = planned(torch.tensor([[0, 1, 2], [2, 1, 0]]))
    large = torch.tensor([3e38, 3e38, 3e38, 3e38, -3e38, -3e38])[:, None]
    between = permutation_oracle.combine(large, plan)
    # Token 0 adds 3e38, 3e38 and -3e38; token 1 adds -3e38, 3e38 and 3e38.
    assert between.least.flatten().tolist() == [torch.inf, float(large[0])]
    assert between.greatest.flatten().tolist() == [torch.inf, float(large[0])]
