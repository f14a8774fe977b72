"""Counts of several ranks are added: each process of a Gloo group has a part of the batch."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_routing.balancing import load_balancing_loss, sequence_balancing_loss, update_bias, z_loss

RANKS = 2


@pytest.mark.slow
def test_the_mean_over_ranks_is_the_loss_of_the_whole_batch_and_biases_stay_equal(tmp_path):
    seed = random.getrandbits(32)
    script = str(Path(__file__).with_name("rank.py"))
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(RANKS), str(tmp_path / "store"), str(seed)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    said = [json.loads(process.communicate()[0]) for process in processes]
    logits = torch.randn(RANKS, 9, 8, generator=torch.Generator().manual_seed(seed))
    ids = logits.topk(2).indices
    leaf = logits.clone().requires_grad_()
    whole = load_balancing_loss(leaf, ids)
    whole.backward()
    mean = torch.tensor([rank["loss"] for rank in said]).mean()
    torch.testing.assert_close(mean, whole.detach())
    exact = [whole.item(), sequence_balancing_loss(logits, ids).item(), z_loss(logits).item()]
    for rank in said:  # DTensors that are sharded give what the whole batch gives
        assert rank["of shards"] == pytest.approx(exact)
    refused = "group: expected a group that this rank is in, got one that it is not in"
    assert [rank["outside"] for rank in said] == ["", *[refused] * (RANKS - 1)]
    gradients = torch.tensor([rank["gradient"] for rank in said]) / RANKS
    torch.testing.assert_close(gradients, leaf.grad)
    counts = ids.flatten(1).new_tensor([rank["counts"] for rank in said])
    bias = torch.zeros(8)
    update_bias(bias, counts.sum(0), 0.5)
    assert [rank["bias"] for rank in said] == [bias.tolist()] * RANKS
    assert counts.tolist() == [row.bincount(minlength=8).tolist() for row in ids.flatten(1)]
