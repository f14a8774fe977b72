"""The kit of ``exchange`` on ranks of a gloo group: right transports pass, wrong ones do not."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mutants.exchange import CHANGES, MUTANTS

from moe_routing.conformance import run
from moe_routing.conformance.contract import contract_of

HERE = Path(__file__).parent
WRONG = [mutant for mutant in MUTANTS if not mutant.only_on]


def started(ranks, *arguments, folder=HERE.parent / "support"):
    """Run what torchrun starts on that many ranks, with modules of the folder."""
    command = [
        sys.executable, "-W", "error", "-m", "torch.distributed.run", "--standalone",
        "--nproc-per-node", str(ranks), *map(str, arguments),
    ]  # fmt: skip
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def _told(ranks):
    done = started(ranks, HERE / "exchange_rank.py", random.getrandbits(32))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_the_command_checks_every_transport_and_rank_0_shows_them():
    arguments = ("-m", "moe_routing", "conformance", "--distributed", "--clause", "9")
    done = started(2, *arguments)
    assert done.returncode == 0, done.stderr
    for name in ("all-to-all", "all-reduce"):
        assert f"{name} conforms: 10 checked" in done.stdout
        assert done.stdout.count(f"{name} (") == 1
    said = json.loads(started(2, *arguments, "--json").stdout)
    assert said["ok"]
    assert [one["backend"] for one in said["reports"]] == ["all-reduce", "all-to-all"]
    assert {one["device"].rpartition(", ")[2] for one in said["reports"]} == {"2 ranks"}


ON_ONE_RANK = """
import os, sys
from moe_routing._registry import registry
from moe_routing.cli import main
from moe_routing_registry import ANY, BackendSpec, RejectCode, Target, Verdict

def supports(problem, device):
    if os.environ["RANK"] == "1":
        return Verdict.no(RejectCode.TOOLCHAIN, "finds no network card")
    return Verdict.yes()

registry().register(
    BackendSpec(
        name="cards",
        factories={"exchange": "moe_routing_backends.all_to_all.exchange:build"},
        targets=(Target(ANY),),
        supports=supports,
    )
)
main()
"""


@pytest.mark.slow
def test_a_transport_that_one_rank_cannot_use_is_not_checked(tmp_path):
    (tmp_path / "cards.py").write_text(ON_ONE_RANK)
    arguments = (tmp_path / "cards.py", "conformance", "--distributed", "--clause", "9")
    done = started(2, *arguments, "cards")
    assert "cannot be used on rank 1: it finds no network card" in " ".join(done.stdout.split())
    assert done.returncode == 1  # torchrun's, of a rank that ended with 2
    done = started(2, *arguments)
    assert done.returncode == 0, done.stderr
    assert "finds no network card" in done.stdout
    assert "all-reduce conforms" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "BACKEND: expected a name"),
        (["--distributed"], "--distributed: expected a process of torchrun, got none; torchrun "),
        (["--distributed", "--operation", "plan"], "--operation: expected exchange"),
    ],
)
def test_what_the_command_needs_is_said(arguments, said):
    done = subprocess.run(
        [sys.executable, "-m", "moe_routing", "conformance", *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert said in done.stderr


@pytest.mark.parametrize("transport", ["all-to-all", "all-reduce"])
def test_the_built_in_transports_conform_in_a_process_alone(transport):
    report = run(transport, operation="exchange")
    assert [f"{one.id}: {one.message}" for one in report.failed] == []
    assert report.verdict.startswith("conforms")
    assert "needs 2 ranks: torchrun --nproc-per-node 2 -m moe_routing" in report.verdict


@pytest.fixture(scope="module")
def told():
    """Return what two ranks found, which one start of processes tries in turn."""
    return _told(2)


@pytest.mark.slow
def test_the_built_in_transports_conform_on_two_ranks(told):
    assert {name: kit["failed"] for name, kit in told["kits"].items()} == {
        "all-to-all": [],
        "all-reduce": [],
    }


@pytest.mark.slow
def test_the_built_in_transports_conform_on_three_ranks():
    told = _told(3)
    assert told["ranks"] == 3
    assert [kit["failed"] for kit in told["kits"].values()] == [[], []]
    assert all(kit["verdict"].startswith("conforms") for kit in told["kits"].values())


@pytest.mark.slow
@pytest.mark.parametrize("mutant", WRONG, ids=lambda mutant: f"{mutant.name}-{mutant.caught_by}")
def test_a_mutant_is_caught_by_the_check_that_is_named_for_it(mutant, told):
    must_say(told["mutants"][mutant.name], mutant.saying)


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.name)
def test_a_change_of_the_product_is_caught_by_the_check_that_is_named_for_it(change, told):
    must_say(told["changes"][change.name], change.saying)


def must_say(found, saying):
    """Require that a check failed, and says what it must; to crash proves nothing."""
    messages = [message for message in found["failed"] if "Traceback" not in message]
    assert any(re.search(saying, message) for message in messages), found


@pytest.mark.slow
def test_a_right_transport_fails_no_check(told):
    assert {check: one["failed"] for check, one in told["right"].items() if one["failed"]} == {}


def test_every_check_has_a_mutant_and_every_clause_a_check():
    contract = contract_of("exchange")
    caught = {one.caught_by for one in (*MUTANTS, *CHANGES)}
    assert caught == {check.name for check in contract.checks}
    assert {check.clause for check in contract.checks} == set(contract.clauses)


def test_ids_of_checks_are_unique():
    import torch  # noqa: F401 -- the checks' cases need it

    ids = [item.id for item in contract_of("exchange").items("quick")]
    assert len(set(ids)) == len(ids)
