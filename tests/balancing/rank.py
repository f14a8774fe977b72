"""One rank of ``test_across_ranks.py``: prints as JSON what it computed of its part of a batch."""

import json
import sys

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from moe_routing.balancing import load_balancing_loss, sequence_balancing_loss, update_bias, z_loss


def refusal(bias, counts):
    """Return what a rank is told that is not in the group; the group is rank 0's."""
    group = distributed.new_group([0])
    try:
        update_bias(bias.clone(), counts, 0.5, group=group)
    except ValueError as error:
        return str(error)
    return ""


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
    shards = [
        DTensor.from_local(part, init_device_mesh("cpu", (ranks,)), [Shard(0)])
        for part in (logits.detach(), ids)
    ]
    said = {
        "of shards": [
            load_balancing_loss(*shards).full_tensor().item(),
            sequence_balancing_loss(*(part.unflatten(0, (ranks, 9)) for part in shards))
            .full_tensor()
            .item(),
            z_loss(shards[0]).full_tensor().item(),
        ],
        "outside": refusal(bias, counts),
        "loss": loss.item(), "gradient": logits.grad.tolist(),
        "bias": bias.tolist(), "counts": counts.tolist(),
    }  # fmt: skip
    sys.stdout.write(json.dumps(said))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
