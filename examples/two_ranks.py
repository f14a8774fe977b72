"""Run a layer whose experts are spread over two ranks, and compare it with one process.

torchrun --nproc-per-node 2 examples/two_ranks.py

Each rank uses its own GPU where the machine has one for each rank, and the CPU otherwise.
"""

from __future__ import annotations

import os

import torch
from torch import distributed

import moe_routing
from moe_routing.distributed import ExpertParallel

EXPERTS, TOPK, HIDDEN, TOKENS = 8, 2, 64, 100


def main() -> None:
    """Compute the same tokens with experts on all ranks, and with all experts here."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    on_gpus = torch.cuda.device_count() >= ranks
    device = torch.device(f"cuda:{rank}" if on_gpus else "cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if on_gpus else "gloo")

    generator = torch.Generator().manual_seed(0)  # the same numbers on every rank
    experts = torch.randn(EXPERTS, HIDDEN, HIDDEN, generator=generator).to(device)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(device)
    logits = torch.randn(TOKENS, EXPERTS, generator=generator).to(device)
    mine = slice(rank * TOKENS // ranks, (rank + 1) * TOKENS // ranks)  # this rank's tokens

    route = moe_routing.get_router("mixtral")
    weights, ids = route(logits[mine], TOPK)
    ep = ExpertParallel(None, EXPERTS, topk=TOPK, hidden_size=HIDDEN)
    rows, plan = ep.dispatch(hidden[mine], ids, weights)  # what this rank's experts compute
    output = ep.combine(product(rows, plan, experts[list(ep.local_experts)]))

    weights, ids, plan = route.with_plan(logits, TOPK)  # all tokens and experts, here
    rows = moe_routing.permute(hidden, plan)
    alone = moe_routing.combine(product(rows, plan, experts), plan, weights)

    difference = (output - alone[mine]).abs().max().item()
    print(f"rank {rank} on {device}: {len(output)} tokens, largest difference {difference:.1e}")
    if rank == 0:
        print(ep.report)
    distributed.destroy_process_group()


def product(
    rows: torch.Tensor, plan: moe_routing.DispatchPlan, matrices: torch.Tensor
) -> torch.Tensor:
    """Multiply each expert's rows by its matrix; rows of no expert give zeros."""
    made = torch.zeros_like(rows)
    offsets = plan.offsets.tolist()
    for start, end, matrix in zip(offsets[:-1], offsets[1:], matrices, strict=True):
        made[start:end] = rows[start:end] @ matrix
    return made


if __name__ == "__main__":
    main()
