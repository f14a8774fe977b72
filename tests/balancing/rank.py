"""One rank of ``test_across_ranks.py``: prints as JSON what it computed of its part of a batch."""

import json
import sys

import torch
from torch import distributed

from moe_routing.balancing import load_balancing_loss, update_bias


def main(rank, ranks, store, seed):
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(store, ranks), rank=rank, world_size=ranks
    )
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(ranks, 9, 8, generator=generator)[rank].requires_grad_()
    ids = logits.detach().topk(2).indices
    loss = load_balancing_loss(logits, ids, group=distributed.group.WORLD)
    loss.backward()
    bias, counts = torch.zeros(8), ids.flatten().bincount(minlength=8)
    update_bias(bias, counts, 0.5, group=distributed.group.WORLD)
    said = {
        "loss": loss.item(), "gradient": logits.grad.tolist(),
        "bias": bias.tolist(), "counts": counts.tolist(),
    }  # fmt: skip
    sys.stdout.write(json.dumps(said))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
