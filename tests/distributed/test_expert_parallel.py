"""``ExpertParallel`` in Gloo groups of real processes: values, arguments, failures, transports."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import ranks

FILE = Path(__file__).with_name("ranks_of_expert_parallel.py")
CASES = list(ranks.load(FILE).CASES)


@pytest.fixture(scope="module", params=[2, 3], ids="{0} ranks".format)
def wrong(request, tmp_path_factory):
    """Return what was wrong in each case, on each rank, in one start of so many processes."""
    # Of the run's seed: this comes before the fixture of each test that seeds.
    seed = random.Random(request.config.getoption("--hypothesis-seed")).getrandbits(32)  # noqa: S311 -- a seed
    return ranks.run(FILE, "run", request.param, tmp_path_factory.mktemp("ranks"), seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_on_ranks(name, wrong):
    said = {rank: of_rank[name] for rank, of_rank in enumerate(wrong) if name in of_rank}
    assert not said, "\n".join(f"rank {rank}: {text}" for rank, text in said.items())


@pytest.mark.slow
def test_without_a_group(tmp_path):
    (said,) = ranks.run(FILE, "without_a_group", 1, tmp_path)
    fix = "call torch.distributed.init_process_group first"
    assert said == ["ValueError", f"group: expected a group of torch.distributed, got none; {fix}"]


RELAY = """
from moe_routing_registry import ANY, BackendSpec, Target, hookimpl

def build(problem, device):
    from moe_routing_backends.all_to_all.exchange import build

    kernel = build(problem, device)
    return lambda group: Relay(kernel(group))

class Relay:
    def __init__(self, inner):
        self.inner, self.calls = inner, []

    def dispatch(self, tokens):
        self.calls.append("dispatch")
        return self.inner.dispatch(tokens)

    def combine(self, rows, received):
        self.calls.append("combine")
        return self.inner.combine(rows, received)

@hookimpl
def moe_routing_backends():
    factories = {"exchange": "relay_transport:build"}
    return [BackendSpec(name="relay", factories=factories, targets=(Target(ANY),), priority=90)]
"""


@pytest.mark.slow
def test_an_installed_distribution_brings_a_transport(install_plugin, monkeypatch, tmp_path):
    site = install_plugin("relay_transport", RELAY, distribution="relay", entry_point="relay")
    monkeypatch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
    said = ranks.run(FILE, "brought", 2, tmp_path)
    assert said == [["relay", "relay 1.0", ["dispatch", "combine"]]] * 2


EXAMPLE = Path(__file__).parents[2] / "examples" / "expert_parallel.py"


@pytest.mark.slow
def test_the_example_learns_as_well_on_two_ranks_as_on_one(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # torchrun warns of its absence
    errors = []
    for number in (1, 2):
        run = [*(sys.executable, "-m", "torch.distributed.run"), "--standalone"]
        done = subprocess.run(
            [*run, "--nproc-per-node", str(number), str(EXAMPLE)],
            check=False, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert f"exchange ranks={number} E=8" in done.stdout
        errors.append([float(n) for n in re.findall(r"error (\d\.\d+)", done.stdout)])
    one, two = errors
    assert two == pytest.approx(one, abs=2e-3)
    assert one[1] < one[0] / 4


@pytest.mark.slow
def test_the_tutorials_layer_on_two_ranks_is_that_of_one_process(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # torchrun warns of its absence
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", str(EXAMPLE.with_name("two_ranks.py"))),
        ],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # What two processes print may stand on one line.
    said = re.findall(
        r"rank (\d) on cpu: 50 tokens, largest difference (\d\.\de[+-]\d\d)", done.stdout
    )
    assert sorted(said) == [("0", "0.0e+00"), ("1", "0.0e+00")]


@pytest.mark.slow
def test_the_ranks_that_live_on_make_a_new_group(tmp_path):
    said = ranks.run(FILE, "dying", 3, tmp_path, str(tmp_path), dead=(2,))
    for is_runtime_error, kind, text, number in said[:2]:
        assert is_runtime_error
        assert kind == "TimeoutError"  # of one more object in the old group
        assert text.startswith("group: expected every rank to make an ExpertParallel within 2 s")
        assert number == 2
