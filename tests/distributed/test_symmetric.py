"""The transport ``symmetric``: its kernels in Triton's interpreter, in processes that share memory.

GPUs have the same kernels; ``torchrun --nproc-per-node 2 -m moe_routing conformance --distributed``
checks them there.
"""

import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import ranks

from moe_routing.distributed import ExchangeProblem
from moe_routing_backends import symmetric
from moe_routing_registry import DeviceInfo, RejectCode, Toolchain

FILE = Path(__file__).with_name("ranks_of_symmetric.py")
REDUCE = ("none", "rank")
LEAST_OFF = 2**-5
"""Of sums of bfloat16 numbers below 8."""


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Let the ranks' kernels be interpreted."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "clauses"),
    [(2, [0, 1, 2, 3, 4, 5]), (2, [6]), (2, [7, 8, 9, 10]), (3, [1, 2, 3, 10])],
)
def test_it_conforms(number, clauses, tmp_path):
    for told in ranks.run(FILE, "kit", number, tmp_path, random.getrandbits(32), clauses):
        assert told["failed"] == []
        assert told["verdict"].startswith("conforms")


@pytest.mark.slow
@pytest.mark.parametrize("reduce", REDUCE)
@pytest.mark.parametrize("follows", ["dispatch", "combine"])
def test_what_arrived_stays_until_the_next_call(reduce, follows, tmp_path):
    assert all(ranks.run(FILE, "what_arrived", 2, tmp_path, reduce, follows))


@pytest.mark.slow
@pytest.mark.parametrize("follows", ["dispatch", "combine"])
def test_it_would_not_without_the_handshake(follows, tmp_path):
    stayed = ranks.run(FILE, "what_arrived", 2, tmp_path, "none", follows, "handshake")
    assert stayed == [False, True]


@pytest.mark.slow
def test_nothing_would_have_arrived_without_the_wait(tmp_path):
    assert ranks.run(FILE, "what_arrived", 2, tmp_path, "none", "dispatch", "wait")[0] is False


@pytest.mark.slow
@pytest.mark.parametrize("reduce", REDUCE)
def test_callers_keep_what_they_got(reduce, tmp_path):
    for told in ranks.run(FILE, "callers_keep_what_they_got", 2, tmp_path, reduce):
        assert told["same"]
        assert told["off"] < LEAST_OFF


@pytest.mark.slow
@pytest.mark.parametrize("reduce", REDUCE)
def test_columns_and_slots_may_change_from_call_to_call(reduce, tmp_path):
    for off in ranks.run(FILE, "sizes_change", 2, tmp_path, reduce):
        assert max(off) < LEAST_OFF


@pytest.mark.slow
def test_more_tokens_than_the_most_are_refused_before_anything_is_written(tmp_path):
    for said in ranks.run(FILE, "too_many_tokens", 2, tmp_path):
        assert said.startswith(
            "hidden: expected max_tokens=5 rows or fewer, got a Tensor of shape "
        )


@pytest.mark.slow
def test_a_rank_that_does_not_come_is_named_by_the_next_call(tmp_path):
    said, _ = ranks.run(FILE, "a_rank_is_late", 2, tmp_path)
    assert said == "group: expected every rank to exchange within 300 s, rank 1 did not"


@pytest.mark.slow
def test_second_gradients_know_the_experts_of_their_own_call(tmp_path):
    for square, second in ranks.run(FILE, "second_gradients", 2, tmp_path):
        # d2/df2 of the sum of (f**2 x)**2, at f = 1.5
        assert second == pytest.approx(12 * square / 1.5**2, rel=1e-3)


@pytest.mark.slow
def test_what_another_object_dispatched_is_refused(tmp_path):
    for said in ranks.run(FILE, "results_of_another", 2, tmp_path):
        assert said.startswith("received: expected what this ExpertParallel dispatched")


@pytest.mark.slow
def test_a_copy_exchanges_through_the_same_memory(tmp_path):
    for off in ranks.run(FILE, "copies", 2, tmp_path):
        assert max(off) < LEAST_OFF


@pytest.mark.slow
def test_a_wait_is_timed_from_its_own_begin():
    script = Path(__file__).with_name("wait_with_a_clock.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"after 15 idle minutes": 0, "never": 2}


H100 = DeviceInfo(
    type="cuda",
    platform="cuda",
    arch="sm_90",
    toolchains=(Toolchain(name="triton", version="3.6.0", usable=True),),
)
FITS = ExchangeProblem(ranks=8, experts_per_rank=4, max_tokens=64)


def test_it_serves_ranks_of_one_host_with_a_most_of_tokens(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    assert symmetric.supports(FITS, H100)
    assert symmetric.notes(FITS, H100) == (
        "no host synchronisation: keeps memory for 512 rows that arrive for each slot",
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_tokens": 0}, "the most tokens of a rank, which was not stated"),
        ({"ranks": 1}, "the memory of other ranks; there are none"),
        ({"hosts": 2}, "up to 16 ranks of one host, not of 8 ranks on 2 hosts"),
        ({"ranks": 32}, "up to 16 ranks of one host, not of 32 ranks"),
        ({"shared_batch": True, "reduce": "rank"}, "here every rank holds all"),
    ],
)
def test_it_declines_others_and_says_why(changes, says, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    verdict = symmetric.supports(dataclasses.replace(FITS, **changes), H100)
    assert not verdict
    assert verdict.code is RejectCode.GROUP
    assert says in verdict.reason


def test_it_needs_a_triton_that_compiles(monkeypatch):
    assert symmetric.supports(FITS, H100).fix == "unset TRITON_INTERPRET"
    monkeypatch.delenv("TRITON_INTERPRET")
    without = DeviceInfo(type="cuda", platform="cuda", arch="sm_90")
    assert symmetric.supports(FITS, without).code is RejectCode.TOOLCHAIN


def test_gpus_that_do_not_reach_each_other_are_declined_by_name(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr("torch.cuda.can_device_access_peer", lambda _, other: other != 2)
    first = dataclasses.replace(H100, index=0)
    verdict = symmetric.supports(FITS, first)
    assert verdict.reason == (
        "signals to the memory of the host's other GPUs, GPU 0 cannot to GPU 2"
    )
    monkeypatch.setattr("torch.cuda.can_device_access_peer", lambda *_: True)
    assert symmetric.supports(FITS, first)
    driver = SimpleNamespace(cuDeviceGetP2PAttribute=_no_atomics)
    monkeypatch.setattr("ctypes.CDLL", lambda _: driver)
    assert "GPU 0 cannot to GPU 1" in symmetric.supports(FITS, first).reason


def _no_atomics(found, attribute, *_):
    assert attribute == 3
    found._obj.value = 0
    return 0
