"""Time acme against eager: `python benchmark.py [T ...]`.

It prints acme's time, and how many times as fast as eager that is.
"""

import sys
import time

import torch

import moe_routing

RUNS = 9


def best_of(
    route: moe_routing.Router,
    arguments: tuple[torch.Tensor, int],
    operands: dict[str, torch.Tensor],
) -> float:
    """Return the shortest of some calls, in microseconds."""
    route(*arguments, **operands)
    times = []
    for _ in range(RUNS):
        begun = time.perf_counter()
        route(*arguments, **operands)
        times.append(time.perf_counter() - begun)
    return min(times) * 1e6


def compare(router: str, num_tokens: int, num_experts: int, topk: int) -> list[float]:
    """Return the best times of acme and eager on the same logits."""
    logits = torch.randn(num_tokens, num_experts)
    operands = (
        {"bias": torch.randn(num_experts)} if moe_routing.get_router(router).spec.needs_bias else {}
    )
    routers = [moe_routing.get_router(router, backend=name) for name in ("acme", "eager")]
    return [best_of(route, (logits, topk), operands) for route in routers]


if __name__ == "__main__":
    tokens = [int(argument) for argument in sys.argv[1:]] or [1, 256, 4096, 65536]
    for router, num_experts, topk in (
        ("topk_softmax", 128, 8),
        ("softmax_topk", 64, 8),
        ("sigmoid_bias_topk", 256, 8),
    ):
        for num_tokens in tokens:
            acme, eager = compare(router, num_tokens, num_experts, topk)
            size = f"E={num_experts:<4} K={topk} T={num_tokens:<6}"
            print(f"{router:18} {size} {acme:10.1f} us, {eager / acme:5.1f} times as fast as eager")
