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


def _told(ranks):
    command = [
        sys.executable, "-W", "error", "-m", "torch.distributed.run",
        "--nproc-per-node", str(ranks), str(HERE / "exchange_rank.py"), str(random.getrandbits(32)),
    ]  # fmt: skip
    paths = [str(HERE.parent / "support"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


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
