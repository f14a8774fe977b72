"""``moe-routing scale``: what it prints, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from moe_routing.cli._app import run
from moe_routing.distributed.scale import Deployment, DeviceTime, estimates, shipped

ASSUMED = "Between hosts: 50 GB/s and 5 us a step, for each rank: assumed, not measured."


@pytest.fixture
def cli(capsys, monkeypatch):
    """Run a command line here; return exit code, stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(line):
        code = run(line.split())
        return code, *capsys.readouterr()

    return call


def test_it_says_what_is_sent_what_is_fastest_and_what_was_not_measured(cli):
    code, out, err = cli("scale")
    assert (code, err) == (0, "")
    assert "8 ranks on 1 host, 64 tokens a rank, H = 7168, E = 256, K = 8, bfloat16" in out
    assert "512 ranks on 64 hosts, 64 tokens a rank, H = 7168, E = 256 of 2 replicas" in out
    assert "a token reaches 7.68 of 64 ranks and 5.29 of 8 hosts" in out
    assert "sums on up to 64 ranks" in out
    assert "within one host only" in out
    assert "fitted to benchmarks/results/h200-x" in out
    assert "NVIDIA H200" in out
    assert ASSUMED in out
    assert "Not measured: " in out
    assert "more than one host." in out
    assert "Experts are chosen uniformly at random: assumed." in out


def test_the_network_is_assumed_in_every_output_also_within_a_host_and_when_it_is_given(cli):
    _, out, _ = cli("scale --ranks 4")
    assert ASSUMED in out
    _, out, _ = cli("scale --ranks 16 --network-rate 12.5 --network-latency 0")
    assert "Between hosts: 12.5 GB/s and 0 us a step, for each rank: assumed, not measured." in out
    _, out, _ = cli("scale --ranks 16 --network-rate 12.5 --json")
    assert json.loads(out)["network"] == {
        "rate_gb_s": 12.5,
        "latency_us": 5.0,
        "source": "assumed, not measured",
    }


def test_json_holds_the_model(cli):
    line = "scale --ranks 8,16 --tokens 1,64 --hidden 2816 --experts 128 -k 4 --ranks-per-host 4"
    code, out, _ = cli(f"{line} --json")
    said = json.loads(out)
    assert (code, said["schema_version"]) == (0, 1)
    sizes = [(case["ranks"], case["tokens"], case["hosts"]) for case in said["cases"]]
    assert sizes == [(8, 1, 2), (8, 64, 2), (16, 1, 4), (16, 64, 4)]
    names = ("tokens", "hidden_size", "topk", "num_experts", "ranks", "ranks_per_host")
    for case in said["cases"]:
        expected = estimates(Deployment(**{name: case[name] for name in names}))
        assert [way["microseconds"] for way in case["ways"]] == [e.microseconds for e in expected]
        assert [way["bytes_between"] for way in case["ways"]] == [
            e.traffic.bytes_between for e in expected
        ]
        times = {w["name"]: w["microseconds"] for w in case["ways"] if w["microseconds"]}
        assert times[case["fastest"]] == min(times.values())
    assert [change["ranks"] for change in said["changes"]["by_tokens"]] == [8, 16]
    assert [change["tokens"] for change in said["changes"]["by_ranks"]] == [1, 64]
    assert said["changes"]["by_ranks"][0]["from"][0]["ranks"] == 2
    assert said["constants"] == shipped().to_dict()
    assert "the time of all-reduce" in said["not_measured"]


def test_what_was_measured_is_not_said_to_be_missing(cli, monkeypatch):
    measured = shipped()._replace(
        device={
            key: DeviceTime(10.0, 1.0, 300.0)
            for key in [(t, r) for t in ("symmetric", "all-to-all") for r in ("none", "rank")]
        },
        sources=(*shipped().sources, shipped().sources[0]._replace(ranks=8)),
    )
    monkeypatch.setattr("moe_routing.distributed.scale.shipped", lambda: measured)
    _, out, _ = cli("scale --ranks 8,16")
    assert "Not measured: the time of all-reduce; groups of more than 8 ranks" in out
    assert "T = 64 a rank, from 2 ranks on: symmetric" in out
    assert "; from 16: all-to-all" in out


def test_every_cell_is_there_on_a_narrow_screen(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    _, out, _ = cli("scale --ranks 8")
    assert "way: all-to-all rank padded, graph" in out
    assert "  MB useful: 8.50" in out
    assert max(map(len, out.splitlines())) <= 60


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--ranks 8,x", "--ranks: expected an integer >= 1, got 'x'"),
        ("--tokens 0", "--tokens: expected an integer >= 1, got '0'"),
        ("--ranks 1", "--ranks: expected an int of at least 2, got 1"),
        ("--ranks 24", "--ranks: expected a divisor or a multiple of the 256 experts, got 24"),
        (
            "--ranks 16 --ranks-per-host 6",
            "--ranks: expected up to 6, the ranks of a host, or a multiple of them, got 16",
        ),
        ("--topk 300", "--topk: expected at most 256, the experts, got 300"),
        (
            "--hidden 0",
            "Invalid value for '--hidden-size' / '--hidden': expected an integer >= 1, got '0'",
        ),
        (
            "--network-rate 0",
            "Invalid value for '--network-rate': expected a number above 0, got '0'",
        ),
        (
            "--network-rate nan",
            "Invalid value for '--network-rate': expected a number above 0, got 'nan'",
        ),
        (
            "--network-latency -1",
            "Invalid value for '--network-latency': expected a number of at least 0, got '-1'",
        ),
    ],
)
def test_an_argument_that_cannot_be_is_named(line, said, cli):
    assert cli(f"scale {line}") == (2, "", f"moe-routing: {said}\n")


def test_it_imports_no_torch():
    script = (
        "import sys; from moe_routing.cli._app import run; code = run(['scale', '--json']); "
        "print(code, 'torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    assert done.stderr == "0 False\n"
    assert json.loads(done.stdout)["schema_version"] == 1
