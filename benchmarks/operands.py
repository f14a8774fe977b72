"""Time ``route`` with recorded ids, a mask, counts or replicas, and the same call without.

    python benchmarks/operands.py OUT.json

Microseconds a call: the median of CUDA-graph replays over logits in turns. The plain call is timed
first and last. Before that, a record gives the bits of the call that made it. About a minute on an
H100.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import launches
import torch

import moe_routing
from moe_routing import balancing
from moe_routing_backends.triton.tuning.measure import LEAST_SETS, replayed

if TYPE_CHECKING:
    from collections.abc import Callable

DEVICE = torch.device("cuda:0")
FAMILIES = (("gemma4", 128), ("topk_softmax", 128), ("deepseek_v3", 256))
K = 8
TOKENS = (1, 16, 64, 512, 1024, 4096, 65536)
MOST_BYTES = 2 << 30
"""Of the logits that are taken in turns."""


def operands(family: str, experts: int) -> dict[str, Any]:
    """Return what the family takes for each expert."""
    if family == "gemma4":
        return {"per_expert_scale": torch.rand(experts, device=DEVICE)}
    if family == "deepseek_v3":
        return {"bias": torch.randn(experts, device=DEVICE) * 0.1}
    return {}


def timed(family: str, experts: int, tokens: int) -> dict[str, float]:
    """Return microseconds a call, by what it takes more."""
    route, given = moe_routing.get_router(family), operands(family, experts)
    sets = max(2, min(LEAST_SETS, MOST_BYTES // (tokens * experts * 2)))
    logits = [torch.randn(tokens, experts, device=DEVICE).bfloat16() for _ in range(sets)]
    records = []
    for rows in logits:
        weights, ids = route(rows, K, **given)
        again, same = route(rows, K, ids=ids, **given)
        if not (torch.equal(weights, again) and torch.equal(ids, same)):
            sys.exit(f"{family}, T = {tokens}: a record gives other bits")
        records.append(ids)
    short = [ids.to(torch.uint8) for ids in records]
    counts = torch.zeros(experts, dtype=torch.int64, device=DEVICE)
    many = counts.int()
    placement = balancing.place_replicas(
        torch.rand(experts), num_slots=experts * 5 // 4, num_ranks=8
    )
    table, count = placement.logical_to_physical.to(DEVICE), placement.replica_count.to(DEVICE)
    replicas = {"logical_to_physical": table, "replica_count": count}
    mask = torch.rand(tokens, device=DEVICE) < 0.9  # noqa: PLR2004 -- the share of valid tokens

    def turns(more: Callable[[int], dict[str, Any]]) -> float:
        each = itertools.cycle(range(sets))

        def call() -> object:
            turn = next(each)
            return route(logits[turn], K, **given, **more(turn))

        return round(replayed(call, DEVICE), 2)

    return {
        "plain": turns(lambda _: {}),
        "ids": turns(lambda turn: {"ids": records[turn]}),
        "uint8": turns(lambda turn: {"ids": short[turn]}),
        "valid": turns(lambda _: {"valid": mask}),
        "counts": turns(lambda _: {"counts": counts}),
        "int32 counts": turns(lambda _: {"counts": many}),
        "replicas": turns(lambda _: replicas),
        "replicas, counts": turns(lambda _: {"counts": counts, **replicas}),
        "again": turns(lambda _: {}),
    }


def main() -> None:
    """Time, print and write."""
    torch.manual_seed(0)
    results = []
    for (family, experts), tokens in itertools.product(FAMILIES, TOKENS):
        us = timed(family, experts, tokens)
        results.append({"family": family, "T": tokens, **us})
        print(f"{family:12} {tokens:6}", us, flush=True)
        launches.write(Path(sys.argv[1]), "microseconds a call of route", results=results)


if __name__ == "__main__":
    main()
