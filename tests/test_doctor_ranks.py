"""The doctor where torchrun starts it: real ranks, and what recorded ones would be told.

The real ones are processes that meet over gloo.
"""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from moe_routing.cli._render_doctor import render
from moe_routing.doctor import _ranks, examine, examined_by_ranks, launched
from moe_routing.doctor._differences import judged

ROOT = Path(__file__).parents[1]
SOURCES = [str(ROOT), str(ROOT / "registry"), str(ROOT / "backends")]
OURS = ("MOE_ROUTING_BACKEND", "MOE_ROUTING_BLOCK", "MOE_ROUTING_STRICT", "COLUMNS")
STARTED = (*_ranks.VARIABLES, "LOCAL_RANK", "TORCHELASTIC_RUN_ID")


def environment(path=(), **more):
    inherited = {name: value for name, value in os.environ.items() if name not in {*OURS, *STARTED}}
    python_path = os.pathsep.join([*map(str, path), *SOURCES])
    return inherited | {"PYTHONPATH": python_path, "PYTHONIOENCODING": "utf-8"} | more


def torchrun(*arguments, path=()):
    """Run the doctor on two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "moe_routing", "doctor", *arguments]
    return subprocess.run(
        command, env=environment(path), capture_output=True, text=True, check=False
    )


def free_port():
    with socket.socket() as bound:
        bound.bind(("localhost", 0))
        return str(bound.getsockname()[1])


def two(*arguments, only_1=None, module="moe_routing", path=()):
    """Run the doctor on two ranks without torchrun, which would end one when the other ends.

    Return what each gave: exit code, stdout and stderr.
    """
    port, command = free_port(), [sys.executable, "-m", module, "doctor", *arguments]
    with ExitStack() as stack:
        ranks = []
        for rank in range(2):
            said = {
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": port,
            }
            env = environment(path, **said, **(only_1 or {} if rank else {}))
            process = subprocess.Popen(
                command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            ranks.append(stack.enter_context(process))
        said = [rank.communicate() for rank in ranks]
    return [(rank.returncode, *texts) for rank, texts in zip(ranks, said, strict=True)]


def of_ranks(report):
    return [check for check in report["checks"] if check["name"] == "ranks"]


def without_torchs_own(stderr):
    """Leave out what torch.distributed itself says on stderr."""
    return [line for line in stderr.splitlines() if line.startswith("moe-routing")]


@pytest.mark.slow
def test_torchrun_shows_ranks_that_agree_once():
    run = torchrun()
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("Checks\n") == 1
    table = run.stdout.partition("Ranks")[2].partition("Checks")[0].splitlines()
    rows = [line.split() for line in table if line.strip()[:1].isdecimal()]
    assert [row[:2] for row in rows] == [[str(rank), socket.gethostname()] for rank in range(2)]
    for row in rows:
        assert {"eager", "all-to-all", "all-reduce", "none"} <= set(row)
    said = (
        "[✓] ranks: 2 ranks on 1 host agree: eager routes, all-to-all moves tokens\nNo problems.\n"
    )
    assert run.stdout.endswith(said)


@pytest.mark.slow
def test_ranks_that_differ_are_named_and_every_rank_fails():
    (code, out, _), (other_code, other_out, other_err) = two(
        "--json", only_1={"MOE_ROUTING_BLOCK": "eager,all-to-all"}
    )
    report = json.loads(out)
    assert (code, other_code, report["ok"]) == (1, 1, False)
    assert (other_out, without_torchs_own(other_err)) == ("", [])
    chosen = [(one["rank"], one["backend"], one["transport"]) for one in report["ranks"]]
    assert chosen == [(0, "eager", "all-to-all"), (1, None, None)]
    assert [(check["summary"], check["fix"]) for check in of_ranks(report)] == [
        (
            (
                "the backend of route differs: eager on rank 0, none on rank 1; "
                "MOE_ROUTING_BLOCK is not set on rank 0, eager,all-to-all on rank 1"
            ),
            "unset MOE_ROUTING_BLOCK",
        ),
        ("the transport differs: all-to-all on rank 0, none on rank 1", ""),
        ("rank 1: backend: cpu: no backend fits", ""),
    ]
    assert {check["status"] for check in of_ranks(report)} == {"problem"}


ONLY_ON_RANK_1 = """
import os
from moe_routing_registry import ANY, BackendSpec, Target, hookimpl

@hookimpl
def moe_routing_backends():
    factories = {"route": "odd:build"}
    odd = BackendSpec(name="odd", factories=factories, targets=(Target(ANY),))
    return [odd] if os.environ["RANK"] == "1" else []
"""


@pytest.mark.slow
def test_a_plug_in_whose_backend_only_one_rank_has_is_a_problem_with_the_command_for_it(tmp_path):
    (tmp_path / "odd.py").write_text(ONLY_ON_RANK_1)
    info = tmp_path / "moe_odd-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: moe-odd\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[moe_routing.backends]\nodd = odd\n")
    run = torchrun("--json", path=[tmp_path])
    report = json.loads(run.stdout)
    assert run.returncode == 1
    assert [(check["summary"], check["fix"]) for check in of_ranks(report)] == [
        (
            "plug-ins differ: backend odd is missing on rank 0, moe-odd 0.1 on rank 1",
            "pip install moe-odd==0.1",
        )
    ]


BROKEN_ON_RANK_1 = """
import os
import moe_routing.doctor
from moe_routing.cli import main

examine = moe_routing.doctor.examine

def broken(**options):
    examine(**options)  # so that it comes to the others no earlier than usual
    raise ZeroDivisionError("nothing to examine by")

if os.environ["RANK"] == "1":
    moe_routing.doctor.examine = broken
main()
"""


@pytest.mark.slow
def test_an_examination_that_raises_is_a_finding_of_the_others(tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN_ON_RANK_1)
    (code, out, _), (other_code, other_out, other_err) = two(
        "--verbose", module="broken", path=[tmp_path]
    )
    assert (code, other_code) == (1, 1)
    assert (other_out, without_torchs_own(other_err)) == ("", [])
    raised = "ZeroDivisionError: nothing to examine by"
    assert f"[✗] ranks: rank 1: its examination raised {raised}\n" in out
    assert f"      {raised}\n" in out
    assert "not examined" in out


SLOW_TO_SHOW = """
import os, sys, time
from pathlib import Path
import moe_routing.cli._doctor
from moe_routing.cli import main

shown, render = Path(__file__).with_name("shown"), moe_routing.cli._doctor.render

def slow(*arguments, **options):
    time.sleep(1)
    render(*arguments, **options)
    shown.touch()

moe_routing.cli._doctor.render = slow
try:
    main()
finally:
    print("moe-routing: after it was shown:", shown.exists(), file=sys.stderr)
"""


@pytest.mark.slow
def test_no_rank_ends_before_rank_0_has_shown_what_was_found(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW_TO_SHOW)
    for _, _, err in two("--check", "python", module="slow", path=[tmp_path]):
        assert without_torchs_own(err)[-1] == "moe-routing: after it was shown: True"


@pytest.mark.slow
def test_a_problem_of_every_rank_is_said_once_and_every_rank_fails():
    (code, out, _), (other_code, other_out, other_err) = two("--device", "cuda:77", "--json")
    assert (code, other_code) == (1, 1)
    assert (other_out, without_torchs_own(other_err)) == ("", [])
    report = json.loads(out)
    assert [check["name"] for check in report["checks"] if check["status"] == "problem"] == [
        "devices"
    ]
    (check,) = of_ranks(report)
    assert check["summary"] == ("2 ranks on 1 host agree: no backend routes, none moves tokens")


@pytest.mark.slow
def test_a_torch_that_kills_who_imports_it_leaves_each_rank_by_itself(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "import os, signal; os.kill(os.getpid(), signal.SIGILL)"
    )
    (code, out, _), (other_code, other_out, other_err) = two("--json", path=[tmp_path])
    assert (code, other_code, other_out) == (1, 1, "")
    said = "torch cannot be used: importing it kills the process with SIGILL"
    assert without_torchs_own(other_err) == [f"moe-routing: rank 1: {said}"]
    (check,) = of_ranks(json.loads(out))
    assert check["summary"].endswith(f"so this is of rank 0 only: {said}")
    assert check["fix"] == ""


@pytest.mark.slow
def test_wrong_usage_is_said_once():
    (code, out, err), (other_code, other_out, other_err) = two("--check", "trition")
    assert (code, out) == (2, "")
    assert "moe-routing: unknown check 'trition': did you mean 'triton'" in err
    assert other_code == 1
    assert (other_out, without_torchs_own(other_err)) == ("", [])


# In this process


@pytest.fixture
def started(monkeypatch):
    """Return what makes this process one of so many ranks."""

    def start(size, rank=0):
        for name in STARTED:
            monkeypatch.delenv(name, raising=False)
        values = (str(rank), str(size), "localhost", free_port())
        for name, value in zip(_ranks.VARIABLES, values, strict=True):
            monkeypatch.setenv(name, value)

    return start


def test_an_ordinary_process_is_no_rank(monkeypatch):
    for name in STARTED:
        monkeypatch.delenv(name, raising=False)
    assert not launched()
    report = examine(device="cpu", checks=["ranks"])
    (check,) = report["checks"]
    assert (report["ranks"], check["status"]) == ([], "skipped")


def test_a_group_of_one_agrees_with_itself(started):
    import torch

    started(1)
    assert launched()
    with examined_by_ranks(lambda device: examine(device=device, checks=["python"])) as examined:
        assert torch.distributed.is_initialized()
    assert not torch.distributed.is_initialized()
    assert (examined.rank, examined.unmet) == (0, "")
    (one,) = examined.report["ranks"]
    assert (one["device"], one["transport"]) == ("cpu", "all-to-all")
    (check,) = of_ranks(examined.report)
    assert check["summary"] == "1 rank on 1 host agree: eager routes, all-to-all moves tokens"


def test_ranks_that_do_not_come_are_a_problem_that_says_how_to_do_without(started):
    started(2)
    with examined_by_ranks(
        lambda device: examine(device=device, checks=["python"]), seconds=1
    ) as examined:
        report = examined.report
    assert not examined.ok
    assert not report["ok"]
    (check,) = of_ranks(report)
    assert check["summary"].startswith("ranks did not meet (they wait 1 s), so this is of rank 0")
    assert (check["status"], check["fix"]) == ("problem", "unset RANK")
    assert [found["name"] for found in report["checks"]] == ["python", "ranks"]


def test_a_long_wait_is_said_with_what_ends_it(started, monkeypatch):
    monkeypatch.setattr(_ranks, "_QUIET", 0)
    started(2)
    said = []
    with examined_by_ranks(lambda _: examine(device="cpu", checks=[]), seconds=1, say=said.append):
        pass
    assert said == [
        "rank 0 waits for the other ranks, for 1 s at most; `unset RANK` has it examine itself only"
    ]


def test_what_the_examination_raises_on_rank_0_is_raised_there(started):
    def broken(_device):
        msg = "no such thing"
        raise ValueError(msg)

    started(1)
    with pytest.raises(ValueError, match="no such thing"), examined_by_ranks(broken):
        pytest.fail("rank 0 has nothing to show")


@pytest.mark.parametrize(
    ("here", "local_rank", "own"),
    [
        (["cpu"], "3", "cpu"),
        (["cpu", "cuda:0", "cuda:1"], "1", "cuda:1"),
        (["cpu", "cuda:0", "cuda:1"], "5", "cuda:5"),
        (["cpu", "cuda:0"], "3", "cuda:0"),
        (["cpu", "xpu:0", "xpu:1", "npu:0"], "1", "xpu:1"),
    ],
    ids=["no accelerator", "its own", "not here", "the only one that it sees", "the first kind"],
)
def test_a_rank_uses_the_device_of_its_local_rank(monkeypatch, here, local_rank, own):
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert _ranks._own_of(here) == own


# Recorded ranks


def rank(number, **changes):
    alike = {
        "host": "node-a",
        "device": f"cuda:{number}",
        "name": "NVIDIA H100",
        "platform": "cuda",
        "arch": "sm_90",
        "backend": "triton",
        "transport": "all-to-all",
        "shared_batch_transport": "all-reduce",
        "versions": {"moe-routing": "0.1.0", "torch": "2.11.0", "triton": "3.6.0"},
        "plugins": {"acme": "moe-acme 1.2", "acme-2": "moe-acme 1.2"},
    }
    return _ranks._nothing(number) | alike | changes


def warned(summary, status="warning", fix="", name="triton"):
    return {"name": name, "status": status, "summary": summary, "fix": fix, "details": "why"}


VERSIONS = {"moe-routing": "0.1.0", "torch": "2.11.0", "triton": "3.6.0"}


@pytest.mark.parametrize(
    ("changes", "status", "said", "fix"),
    [
        (
            {"versions": VERSIONS | {"moe-routing": "0.2.0"}},
            "problem",
            "moe-routing differs: 0.1.0 on ranks 0-1 and 3, 0.2.0 on rank 2",
            "pip install moe-routing==0.1.0",
        ),
        (
            {"versions": VERSIONS | {"triton": None}},
            "warning",
            "triton differs: 3.6.0 on ranks 0-1 and 3, not installed on rank 2",
            "",
        ),
        (
            {"plugins": {"acme": "moe-acme 1.3", "acme-2": "moe-acme 1.3"}},
            "problem",
            (
                "plug-ins differ: backends acme, acme-2 moe-acme 1.2 on ranks 0-1 and 3, "
                "moe-acme 1.3 on rank 2"
            ),
            "pip install moe-acme==1.2",
        ),
        (
            {"arch": "sm_100"},
            "problem",
            "the kind of device differs: cuda sm_90 on ranks 0-1 and 3, cuda sm_100 on rank 2",
            "",
        ),
        (
            {"shared_batch_transport": None},
            "problem",
            (
                "the transport of a shared batch differs: all-reduce on ranks 0-1 and 3, "
                "none on rank 2"
            ),
            "",
        ),
        ({"device": "cuda:1"}, "warning", "ranks 1-2 share cuda:1 of node-a", ""),
        (
            {"findings": [warned("too old", fix="pip install triton")]},
            "warning",
            "rank 2: triton: too old",
            "pip install triton",
        ),
        ({"error": "it raised"}, "problem", "rank 2: it raised", ""),
    ],
    ids=["ours", "triton", "plug-in", "arch", "transport", "shared", "finding", "broken"],
)
def test_each_difference_is_said_once_with_who_says_what(changes, status, said, fix):
    found = [rank(0), rank(1), rank(2, **changes), rank(3)]
    (check,) = judged(found, asked=False)
    assert (check.name, check.status, check.summary, check.fix) == ("ranks", status, said, fix)


def test_ranks_alike_agree_and_a_finding_of_rank_0_is_not_said_again():
    found = [rank(n, findings=[warned("too old")]) for n in range(4)]
    found[3] |= {"host": "node-b", "device": "cuda:0"}
    (check,) = judged(found, asked=False)
    assert (check.status, check.summary) == (
        "ok",
        "4 ranks on 2 hosts agree: triton routes, all-to-all moves tokens",
    )


def test_what_several_other_ranks_found_is_said_once():
    found = [rank(0), *(rank(n, findings=[warned("too old")]) for n in (1, 2, 3))]
    assert [check.summary for check in judged(found, asked=False)] == ["ranks 1-3: triton: too old"]


def test_ranks_may_share_a_device_that_was_asked_for_or_see_others_by_the_same_name():
    found = [rank(0), rank(1, device="cuda:0")]
    assert [check.status for check in judged(found, asked=True)] == ["ok"]
    for one in found:
        one["environment"] = {"CUDA_VISIBLE_DEVICES": str(one["rank"])}
    assert [check.status for check in judged(found, asked=False)] == ["ok"]


def test_the_table_names_the_checks_that_found_problems():
    wrong = [warned("no", "problem", name=name) for name in ("backend", "torch", "backend")]
    report = examine(device="cpu", checks=["python"])
    report["ranks"] = [
        rank(0),
        rank(1, findings=wrong),
        _ranks._nothing(2) | {"error": "it raised", "host": "node-a"},
    ]
    shown = StringIO()
    render(copy.deepcopy(report), Console(file=shown, width=300), tables=False)
    rows = [line.strip() for line in shown.getvalue().splitlines()]
    assert next(row for row in rows if row.startswith("0")).endswith("none")
    assert next(row for row in rows if row.startswith("1")).endswith("backend, torch")
    assert next(row for row in rows if row.startswith("2")).endswith("not examined")


def test_every_key_of_a_rank_is_documented():
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert [key for key in _ranks._nothing(0) if f"`{key}`" not in page] == []
