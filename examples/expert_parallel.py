"""Train a layer whose experts are spread over the ranks of a group.

torchrun --nproc-per-node 2 examples/expert_parallel.py
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn

import moe_routing
from moe_routing.distributed import ExpertParallel

EXPERTS, TOPK, HIDDEN, INNER, TOKENS, STEPS = 8, 2, 32, 64, 512, 20


class MoE(nn.Module):
    """Experts of two products each; every rank has some of them, and the whole router."""

    def __init__(self) -> None:
        """Keep the experts of this rank."""
        super().__init__()
        self.route = moe_routing.get_router("mixtral")
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.ep = ExpertParallel(None, EXPERTS, topk=TOPK, hidden_size=HIDDEN)
        up = torch.randn(EXPERTS, HIDDEN, INNER) * HIDDEN**-0.5
        down = torch.randn(EXPERTS, INNER, HIDDEN) * INNER**-0.5
        mine = list(self.ep.local_experts)
        self.up, self.down = nn.Parameter(up[mine]), nn.Parameter(down[mine])

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the experts' results for the tokens of this rank."""
        weights, ids = self.route(self.router(hidden), TOPK)
        rows, plan = self.ep.dispatch(hidden, ids, weights)  # the rows of this rank's experts
        parts = rows.split(plan.counts.tolist())  # a grouped product takes plan.offsets instead
        matrices = zip(parts, self.up, self.down, strict=True)
        made = [(part @ up).relu() @ down for part, up, down in matrices]
        return self.ep.combine(torch.cat(made))  # the results of this rank's tokens


def main() -> None:
    """Train; all ranks print the same, so the first one does."""
    distributed.init_process_group("gloo")  # "nccl" for GPUs
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(0)  # the same router, experts and data on every rank
    layer = MoE()
    target = nn.Sequential(nn.Linear(HIDDEN, INNER), nn.ReLU(), nn.Linear(INNER, HIDDEN))
    target.requires_grad_(requires_grad=False)
    optimizer = torch.optim.AdamW(layer.parameters(), 1e-2)
    if rank == 0:
        print(layer.ep.report)
    for step in range(STEPS):
        hidden = torch.randn(TOKENS, HIDDEN).chunk(ranks)[rank]  # this rank's tokens
        error = (layer(hidden) - target(hidden)).square().mean()
        optimizer.zero_grad()
        error.backward()
        with torch.no_grad():
            # The loss is the mean over ranks. The gradient of an expert has come back from all of
            # them; that of the router has not.
            distributed.all_reduce(layer.router.weight.grad)
            for parameter in layer.parameters():
                parameter.grad /= ranks
            distributed.all_reduce(error)
        optimizer.step()
        if rank == 0 and step in (0, STEPS - 1):
            print(f"step {step}: error {error.item() / ranks:.4f}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
