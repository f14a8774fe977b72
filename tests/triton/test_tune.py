"""Tuning: candidates are checked before they are timed, and what is kept applies from then on.

Kernels run in Triton's interpreter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Tune twice, in processes of their own.

    The rows variant is wrong in one, and raises in the other.
    """

    def run(how):
        environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp(how))}
        script = Path(__file__).with_name("interpreted_tune.py")
        done = subprocess.run(
            [sys.executable, str(script), how],
            check=False,
            capture_output=True,
            text=True,
            env=environment,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    return {how: run(how) for how in ("wrong", "raises")}


@pytest.mark.parametrize(
    ("how", "where", "sentence"),
    [("wrong", "wrong", "other bits"), ("raises", "unusable", "registers")],
)
def test_what_computes_wrong_or_does_not_run_is_said_and_never_used(tuned, how, where, sentence):
    found = tuned[how]
    assert {"cooperative", "thread_per_row"} <= set(found["offered"])
    assert len(found["tuned"][where]) == found["of_rows"] > 0
    assert all(sentence in said for said in found["tuned"][where])
    assert "thread_per_row" not in {step["variant"] for step in found["kept"]}


def test_the_fastest_that_is_right_is_kept_and_applies(tuned):
    found = tuned["wrong"]
    assert found["kept"] == [found["last_right"]]
    assert found["source"] == found["tuned"]["table"]
    assert Path(found["source"]).is_file()
    assert "the derived table" in found["tuned"]["before"]
    assert [timed["tokens"] for timed in found["tuned"]["timed"]] == [1, 3]
    assert all(timed["us"] <= timed["us_before"] for timed in found["tuned"]["timed"])


def test_progress_counts_every_candidate_for_every_number_of_tokens(tuned):
    (_, first, every), (last_said, last, _), reports = tuned["wrong"]["steps_said"]
    assert (first, last, reports) == (0, every, every + 1)
    assert last_said == "done"
