"""``ExpertParallel`` in Gloo groups of real processes: values, arguments, failures, transports."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import ranks

FILE = Path(__file__).with_name("ranks_of_expert_parallel.py")
CASES = list(ranks.load(FILE).CASES)


@pytest.fixture(scope="module", params=[2, 3], ids="{0} ranks".format)
def wrong(request, tmp_path_factory):
    """Return what was wrong in each case, on each rank, in one start of so many processes."""
    seed = random.getrandbits(32)
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


@pytest.mark.slow
def test_the_ranks_that_live_on_make_a_new_group(tmp_path):
    said = ranks.run(FILE, "dying", 3, tmp_path, str(tmp_path), dead=(2,))
    for _, is_runtime_error, text, number in said[:2]:
        assert is_runtime_error, text
        assert number == 2
