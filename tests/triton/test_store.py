"""The user's own launch tables: kept for one device, driver and Triton, merged, and never lost to another process."""

import dataclasses
import json
import math
import re
import subprocess
import sys
import textwrap

import pytest

from moe_routing_backends.triton import choose, store, table
from moe_routing_backends.triton.plan import Launch
from moe_routing_registry import DeviceInfo, RoutingProblem, RoutingSpec, Toolchain

TRITON = Toolchain(name="triton", version="3.6.0", usable=True)
H200 = DeviceInfo(
    type="cuda", platform="cuda", arch="sm_90", name="NVIDIA H200", driver="580.1", warp_sizes=(32,), toolchains=(TRITON,)
)
GEMMA4 = RoutingSpec(family="gemma4", renormalize=True, per_expert_scale=True)
PROBLEM = RoutingProblem(spec=GEMMA4, num_experts=128, topk=8, dtype="bfloat16")
RULE = (table.Step(math.inf, Launch("lanes", 8, 1, 4)),)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store.own_table.cache_clear()
    yield tmp_path
    store.own_table.cache_clear()


def rewritten(**changes):
    """Change what a kept file says."""
    path = store.keep(H200, {table.key_of(PROBLEM): RULE})
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def test_what_is_kept_speaks_from_then_on_and_says_so(home):
    assert "tuned on this" not in choose.said_of(H200, PROBLEM)
    path = store.keep(H200, {table.key_of(PROBLEM): RULE})
    assert path.is_relative_to(home)
    assert choose.speaking(H200, PROBLEM).steps(PROBLEM) == RULE
    assert str(path) in choose.said_of(H200, PROBLEM)
    assert "tuned on this NVIDIA H200 (driver 580.1, triton 3.6.0)" in choose.said_of(H200, PROBLEM)


def test_a_problem_that_was_not_tuned_keeps_the_shipped_rule():
    store.keep(H200, {table.key_of(PROBLEM): RULE})
    other = dataclasses.replace(PROBLEM, num_experts=256)
    assert "tuned" not in choose.said_of(H200, other)


def test_tuning_another_problem_later_keeps_the_first_one():
    other = dataclasses.replace(PROBLEM, dtype="float32")
    store.keep(H200, {table.key_of(PROBLEM): RULE})
    store.keep(H200, {table.key_of(other): RULE})
    for kept in (PROBLEM, other):
        assert choose.speaking(H200, kept).steps(kept) == RULE


@pytest.mark.parametrize("changes", [{"name": "NVIDIA H100"}, {"driver": "581.0"}, {"toolchains": ()}])
def test_another_part_driver_or_triton_does_not_use_it(changes):
    store.keep(H200, {table.key_of(PROBLEM): RULE})
    assert "tuned" not in choose.said_of(dataclasses.replace(H200, **changes), PROBLEM)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"device": {"name": "NVIDIA H100", "driver": "580.1", "triton": "3.6.0"}}, "it is of name NVIDIA H100"),
        ({"device": {"name": "NVIDIA H200", "driver": "581.0", "triton": "3.6.0"}}, "driver 581.0, triton 3.6.0, this is"),
        ({"device": None}, "device: expected dict, got None"),
        ({"schema": 0}, "schema: expected 1, got 0"),
        ({"rules": 3}, "rules: expected list, got 3"),
    ],
)
def test_a_foreign_stale_or_corrupt_table_is_ignored_with_a_warning_and_replaced_at_the_next_tuning(changes, complaint):
    path = rewritten(**changes)
    pattern = re.escape(str(path)) + ".*" + re.escape(complaint)
    with pytest.warns(RuntimeWarning, match=pattern):
        assert "tuned" not in choose.said_of(H200, PROBLEM)
    with pytest.warns(RuntimeWarning, match=pattern):
        store.keep(H200, {table.key_of(PROBLEM): RULE})
    assert "tuned" in choose.said_of(H200, PROBLEM)


def test_a_table_is_written_whole_or_not_at_all(home):
    store.write(home / "t.json", "old")
    with pytest.raises(TypeError):
        store.write(home / "t.json", None)
    assert (home / "t.json").read_text() == "old"
    assert [file.name for file in home.iterdir()] == ["t.json"]


KEEPING = """
    import sys
    from moe_routing_backends.triton import choose, store, table
    from moe_routing_backends.triton.plan import Launch
    from moe_routing_registry import DeviceInfo, Toolchain

    device = DeviceInfo(type="cuda", platform="cuda", arch="sm_90", name="NVIDIA H200", driver="580.1", warp_sizes=(32,),
                        toolchains=(Toolchain(name="triton", version="3.6.0", usable=True),))
    first = int(sys.argv[1])
    print("ready", flush=True)
    sys.stdin.readline()
    for experts in range(first, first + 100):
        store.keep(device, {("logits", 16, experts, 8): (table.Step(float("inf"), Launch("lanes", 1, 1, 1)),)})
"""


def test_two_processes_that_tune_at_once_lose_nothing():
    command = [sys.executable, "-c", textwrap.dedent(KEEPING)]
    both = [
        subprocess.Popen([*command, first], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for first in ("1000", "2000")
    ]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in both:
        process.communicate()
        assert process.returncode == 0
    rules = store.own_table(H200).rules
    assert {key[2] for key in rules} == {*range(1000, 1100), *range(2000, 2100)}
