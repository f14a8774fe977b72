"""The user's own launch tables.

They are kept for one device, driver and Triton, merged, and never lost to another process.
"""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import textwrap

import pytest

from moe_routing_backends.triton.kernels.spec import Launch
from moe_routing_backends.triton.tuning import choose, store, table, tune
from moe_routing_registry import DeviceInfo, RoutingProblem, RoutingSpec, Toolchain

TRITON = Toolchain(name="triton", version="3.6.0", usable=True)
H200 = DeviceInfo(
    type="cuda",
    platform="cuda",
    arch="sm_90",
    name="NVIDIA H200",
    driver="580.1",
    warp_sizes=(32,),
    toolchains=(TRITON,),
)
GEMMA4 = RoutingSpec(family="gemma4", renormalize=True, per_expert_scale=True)
PROBLEM = RoutingProblem(spec=GEMMA4, num_experts=128, topk=8, dtype="bfloat16")
RULE = (table.Step(math.inf, Launch("cooperative", 8, 1, 4)),)


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


def test_what_is_kept_applies_from_then_on_and_says_so(home):
    assert "tuned on this" not in choose.describe_table(H200, PROBLEM)
    path = store.keep(H200, {table.key_of(PROBLEM): RULE})
    assert path.is_relative_to(home)
    assert choose.table_for(H200, PROBLEM).steps(PROBLEM) == RULE
    assert str(path) in choose.describe_table(H200, PROBLEM)
    assert "tuned on this NVIDIA H200 (driver 580.1, triton 3.6.0)" in choose.describe_table(
        H200, PROBLEM
    )


def test_a_problem_that_was_not_tuned_keeps_the_shipped_rule():
    store.keep(H200, {table.key_of(PROBLEM): RULE})
    other = dataclasses.replace(PROBLEM, num_experts=256)
    assert "tuned" not in choose.describe_table(H200, other)


def test_tuning_another_problem_later_keeps_the_first_one():
    other = dataclasses.replace(PROBLEM, dtype="float32")
    store.keep(H200, {table.key_of(PROBLEM): RULE})
    store.keep(H200, {table.key_of(other): RULE})
    for kept in (PROBLEM, other):
        assert choose.table_for(H200, kept).steps(kept) == RULE


@pytest.mark.parametrize(
    "changes", [{"name": "NVIDIA H100"}, {"driver": "581.0"}, {"toolchains": ()}]
)
def test_another_part_driver_or_triton_does_not_use_it(changes):
    store.keep(H200, {table.key_of(PROBLEM): RULE})
    assert "tuned" not in choose.describe_table(dataclasses.replace(H200, **changes), PROBLEM)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"device": {"name": "NVIDIA H100", "driver": "580.1", "triton": "3.6.0"}},
            "it is of name NVIDIA H100",
        ),
        (
            {"device": {"name": "NVIDIA H200", "driver": "581.0", "triton": "3.6.0"}},
            "driver 581.0, triton 3.6.0, this is",
        ),
        ({"device": None}, "device: expected dict, got None"),
        ({"schema": 0}, "schema: expected 1, got 0"),
        ({"rules": 3}, "rules: expected list, got 3"),
    ],
)
def test_a_foreign_stale_or_corrupt_table_is_ignored_with_a_warning_and_replaced_at_the_next_tuning(
    changes, complaint
):
    path = rewritten(**changes)
    pattern = re.escape(str(path)) + ".*" + re.escape(complaint)
    with pytest.warns(RuntimeWarning, match=pattern):
        assert "tuned" not in choose.describe_table(H200, PROBLEM)
    with pytest.warns(RuntimeWarning, match=pattern):
        store.keep(H200, {table.key_of(PROBLEM): RULE})
    assert "tuned" in choose.describe_table(H200, PROBLEM)


def test_a_table_is_written_whole_or_not_at_all(home):
    store.write(home / "t.json", "old")
    with pytest.raises(TypeError):
        store.write(home / "t.json", None)
    assert (home / "t.json").read_text() == "old"
    assert [file.name for file in home.iterdir()] == ["t.json"]


KEEPING = """
    import sys
    from moe_routing_backends.triton.tuning import choose
    from moe_routing_backends.triton.tuning import store
    from moe_routing_backends.triton.tuning import table
    from moe_routing_backends.triton.kernels.spec import Launch
    from moe_routing_registry import DeviceInfo, Toolchain

    toolchains = (Toolchain(name="triton", version="3.6.0", usable=True),)
    device = DeviceInfo(type="cuda", platform="cuda", arch="sm_90", name="NVIDIA H200",
                        driver="580.1", warp_sizes=(32,), toolchains=toolchains)
    steps = (table.Step(float("inf"), Launch("cooperative", 1, 1, 1)),)
    first = int(sys.argv[1])
    print("ready", flush=True)
    sys.stdin.readline()
    for experts in range(first, first + 100):
        store.keep(device, {("logits", 16, experts, 8): steps})
"""


@pytest.mark.slow
def test_two_processes_that_tune_at_once_lose_nothing():
    command = [sys.executable, "-c", textwrap.dedent(KEEPING)]
    both = [
        subprocess.Popen(
            [*command, first], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
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


# Files that are broken, and processes that are killed


def put(content):
    """Put bytes where the user's own table is looked for."""
    path = store.user_path(H200)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def table_of(line, **changes):
    rule = {"kind": "logits", "bits": 16, "experts": 128, "width": 8, "steps": [line]}
    held = {
        "schema": 1,
        "arch": "sm_90",
        "provenance": "x",
        "device": store.identity(H200),
        "rules": [rule],
    }
    return json.dumps(held | changes).encode()


GOOD = [None, "thread_per_row", 32, 1, 1]
LONG = "x" * 900_000
BROKEN = {
    "deep": b"[" * 100_000,
    "deep in a field": b'{"schema": 1, "rules": ' + b"[" * 100_000,
    "long": b" " * (1 << 20) + b"{}",
    "not UTF-8": b"\xff\xfe{}",
    "empty": b"",
    "long number": b'{"schema": ' + b"9" * 5000 + b"}",
    "rows beyond a program": table_of([None, "thread_per_row", 2**21, 1, 1]),
    "threads beyond a program": table_of([None, "thread_per_row", 512, 4, 1]),
    "warps beyond a program": table_of([None, "thread_per_row", 32, 1, 64]),
    "warps beyond this device": table_of([None, "cooperative", 1, 1, 64]),
    "threads beyond a warp": table_of([None, "thread_per_row", 1, 128, 1]),
    "a block beyond Triton": table_of([None, "cooperative", 512, 1, 1]),
    "a warp that is none": table_of([None, "thread_per_row", 32, 1, 1, 4]),
    "a warp that this device has not": table_of([None, "thread_per_row", 32, 1, 1, 16]),
    "not a power of two": table_of([None, "thread_per_row", 3, 1, 1]),
    "a schema that is true": table_of([None, "thread_per_row", 32, 1, 1]).replace(
        b'"schema": 1', b'"schema": true'
    ),
    "a list": b"[]",
    "zero": table_of([None, "thread_per_row", 0, 1, 1]),
    "negative": table_of([None, "thread_per_row", -2, 1, 1]),
    "a fraction": table_of([None, "thread_per_row", 2.0, 1, 1]),
    "true": table_of([None, "thread_per_row", True, 1, 1]),
    "tokens that are no number": table_of([float("nan"), "thread_per_row", 32, 1, 1]),
    "infinite tokens": table_of([float("inf"), "thread_per_row", 32, 1, 1]),
    "tokens that are true": table_of([True, "thread_per_row", 32, 1, 1]),
    "a variant that is a list": table_of([None, ["thread_per_row"], 32, 1, 1]),
    "a long schema": table_of(GOOD, schema=LONG),
    "a schema in pieces": table_of(GOOD, schema=[1] * 9000),
    "a long provenance": table_of(GOOD, provenance=LONG),
    "a long device": table_of(GOOD, device={"name": LONG, "driver": "", "triton": ""}),
    "a device in pieces": table_of(
        GOOD, device={"name": {"x": [1] * 9000}, "driver": "", "triton": ""}
    ),
    "a device with more": table_of(GOOD, device={LONG: 1, "name": "", "driver": "", "triton": ""}),
    "a device with less": table_of(GOOD, device={}),
    "another device, named at length": table_of(
        GOOD, device=dict.fromkeys(("name", "driver", "triton"), "x" * 900)
    ),
    "a device with an escape": table_of(
        GOOD, device={"name": "a\x1b[31m", "driver": "", "triton": ""}
    ),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_table_is_ignored_by_routing_and_repaired_by_tuning(content):
    path = put(content)
    with pytest.warns(RuntimeWarning, match=re.escape(str(path))) as warned:
        assert "tuned" not in choose.describe_table(H200, PROBLEM)
    said = [str(warning.message) for warning in warned]
    assert all(text.isprintable() and len(text) < 1100 + len(str(path)) for text in said)
    with pytest.warns(RuntimeWarning, match=re.escape(str(path))):
        store.keep(H200, {table.key_of(PROBLEM): RULE})
    assert choose.table_for(H200, PROBLEM).steps(PROBLEM) == RULE


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ({"name": {"x": 1}}, "name: expected str, got {'x': 1}"),
        ({"name": "a", "driver": 580.1}, "driver: expected str, got 580.1"),
        ({"triton": LONG}, "triton: expected at most 2000 characters, got 900000"),
    ],
)
def test_what_a_table_says_of_its_device_is_text(device, said):
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        table.parse(table_of(GOOD, device=device).decode(), "x.json")


def test_of_a_file_without_an_end_only_the_first_mebibyte_is_read():
    path = put(b"")
    os.truncate(path, 1 << 42)
    with pytest.warns(RuntimeWarning, match="expected at most 1048576 bytes"):
        assert store.own_table(H200) is None


@pytest.mark.parametrize("target", ["/dev/zero", "."])
def test_what_is_no_file_is_no_table(target):
    path = store.user_path(H200)
    path.parent.mkdir(parents=True)
    path.symlink_to(target)
    assert store.own_table(H200) is None


@pytest.mark.parametrize("suffix", [".json", ".lock"])
def test_a_folder_in_place_of_a_file_is_refused_before_anything_is_measured(suffix):
    path = store.user_path(H200).with_suffix(suffix)
    path.mkdir(parents=True)
    with pytest.raises(OSError, match=re.escape(str(path))):
        store.check_keeping(H200)


def test_a_pipe_is_no_table_and_no_lock():
    path = put(b"")
    path.unlink()
    os.mkfifo(path)
    os.mkfifo(path.with_suffix(".lock"))
    assert store.own_table(H200) is None
    store.check_keeping(H200)


def test_every_table_that_is_shipped_or_tuned_is_within_the_limits():
    for file in choose.SHIPPED.glob("*.json"):
        assert table.usable(file) is not None
    for launch in tune.candidates(PROBLEM, H200):
        rules = {table.key_of(PROBLEM): (table.Step(math.inf, launch),)}
        store.keep(H200, rules)
        assert store.own_table(H200).rules == rules


def test_a_lock_is_not_followed_through_a_link_and_not_truncated(home):
    precious = home / "precious"
    precious.write_text("mine")
    path = store.user_path(H200)
    path.parent.mkdir(parents=True)
    path.with_suffix(".lock").symlink_to(precious)
    for work in (
        lambda: store.check_keeping(H200),
        lambda: store.keep(H200, {table.key_of(PROBLEM): RULE}),
    ):
        with pytest.raises(OSError, match=re.escape(path.with_suffix(".lock").name)):
            work()
    assert precious.read_text() == "mine"
    path.with_suffix(".lock").unlink()
    path.with_suffix(".lock").write_text("mine")
    store.keep(H200, {table.key_of(PROBLEM): RULE})
    assert path.with_suffix(".lock").read_text() == "mine"


def test_a_link_in_place_of_a_table_is_replaced_and_its_target_left_alone(home):
    precious = home / "precious"
    precious.write_text("mine")
    path = store.user_path(H200)
    path.parent.mkdir(parents=True)
    path.symlink_to(precious)
    with pytest.warns(RuntimeWarning, match="ignores the launch table"):
        store.keep(H200, {table.key_of(PROBLEM): RULE})
    assert precious.read_text() == "mine"
    assert not path.is_symlink()


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from moe_routing_backends.triton.tuning import store
    from moe_routing_backends.triton.tuning import table
    from moe_routing_backends.triton.kernels.spec import Launch
    from moe_routing_registry import DeviceInfo, Toolchain

    toolchains = (Toolchain(name="triton", version="3.6.0", usable=True),)
    device = DeviceInfo(type="cuda", platform="cuda", arch="sm_90", name="NVIDIA H200",
                        driver="580.1", warp_sizes=(32,), toolchains=toolchains)
    steps = (table.Step(float("inf"), Launch("cooperative", 1, 1, 1)),)
    # After the temporary file, before the table.
    Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    store.keep(device, {("logits", 16, 64, 8): steps})
"""


def test_what_a_killed_writer_leaves_is_cleared_by_the_next_and_its_lock_does_not_stay():
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED)], check=False, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = store.user_path(H200).parent
    assert len([file for file in folder.iterdir() if file.suffix == ".tmp"]) == 1
    assert store.own_table(H200) is None
    (folder / "of another device.json.x.tmp").write_text("")
    path = store.keep(H200, {table.key_of(PROBLEM): RULE})
    assert sorted(file.name for file in folder.iterdir()) == sorted(
        [path.name, path.with_suffix(".lock").name, "of another device.json.x.tmp"]
    )


def test_a_name_of_any_length_and_alphabet_is_a_file_name():
    odd = dataclasses.replace(H200, name="../\x00" + "é" * 500)
    path = store.keep(odd, {table.key_of(PROBLEM): RULE})
    assert path.parent == store.user_path(H200).parent
    assert path.is_file()


def test_a_table_with_a_variant_that_the_device_has_not_is_ignored():
    older = dataclasses.replace(H200, arch="sm_80")
    path = store.user_path(older)
    path.parent.mkdir(parents=True)
    path.write_bytes(table_of([None, "filter", 16, 2, 1]))
    with pytest.warns(RuntimeWarning, match="expected no launch of 'filter' on sm_80"):
        assert store.own_table(older) is None
