"""Kept results of one kind of device are compared.

What got slower beyond the noise is named.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "compare_results.py"


def cliffs(us, device="NVIDIA H100"):
    return {"device": device, "cases": [{"rule": "logits/16/128/8 K=8", "us": us}]}


def gpu(us):
    return {
        "device": "NVIDIA H100",
        "cases": [{"spec": "gemma4", "dtype": "bfloat16", "E": 128, "K": 8, "T": 64, "us": us}],
    }


@pytest.fixture
def compared(tmp_path):
    """Compare two results in a process; return its exit code, output and complaint."""

    def run(*results):
        paths = [tmp_path / name for name in ("before.json", "after.json")]
        for path, result in zip(paths, results, strict=True):
            path.write_text(json.dumps(result))
        done = subprocess.run(
            [sys.executable, SCRIPT, *paths], check=False, capture_output=True, text=True
        )
        return done.returncode, done.stdout, done.stderr

    return run


def test_what_every_run_after_is_slower_than_every_run_before_is_a_loss_beyond_3_percent(compared):
    before = cliffs({"1": [1.0, 1.1, 1.0], "64": [2.0, 2.0, 2.0], "512": [3.0, 3.0, 3.0]})
    after = cliffs(
        {
            "1": [1.13, 1.13, 1.2],
            "64": [2.3, 2.2, 2.2],
            "512": [3.0, 9.0, 3.0],
            "513": [9.0, 9.0, 9.0],
        }
    )
    code, out, _ = compared(before, after)
    assert code == 1
    assert out.splitlines() == [
        "3 times on NVIDIA H100: 1 slower, 0 faster",
        " 10.0%  logits/16/128/8 K=8, T = 64: 2.00 2.00 2.00 -> 2.30 2.20 2.20 us",
    ]


def test_what_is_within_3_percent_or_the_noise_is_no_loss(compared):
    before, after = (
        cliffs({"1": [1.0, 1.2, 1.0], "64": [2.0, 2.0, 2.0]}),
        cliffs({"1": [1.2, 1.2, 1.2], "64": [1.0, 1.0, 1.0]}),
    )
    code, out, _ = compared(before, after)
    assert code == 0
    assert out.splitlines() == [
        "2 times on NVIDIA H100: 0 slower, 1 faster",
        "at most 2.00 times faster: logits/16/128/8 K=8, T = 64",
    ]


@pytest.mark.parametrize(("us", "code"), [(1.03, 0), (1.04, 1)])
def test_a_result_with_one_time_a_case_has_the_3_percent_alone(compared, us, code):
    assert compared(gpu(1.0), gpu(us))[0] == code


@pytest.mark.parametrize(
    ("after", "complaint"),
    [
        (cliffs({"1": [1.0]}, "NVIDIA H200"), "expected a result of NVIDIA H100, as"),
        (cliffs({"2": [1.0]}), "expected problems that"),
        (
            {"device": "NVIDIA H100", "rules": []},
            "expected a result of launch_tables.py cliffs or of gpu.py, got one of device, rules",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(compared, after, complaint):
    code, out, err = compared(cliffs({"1": [1.0]}), after)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "after.json: " in err
    assert complaint in err
