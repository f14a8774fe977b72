"""The eager backend on the CPU against the two formulas that people write.

It runs in one thread, and prints medians and spread.

    python benchmarks/cpu_eager.py [--json FILE] [--tokens 1,16,64,256,4096,65536]

`one-hot`: softmax over all experts, masked to the chosen by a one-hot, renormalised, scaled (the
published Gemma4 reference). `top-k first`: torch.topk, softmax over the K chosen in float32,
scaled; its ties are arbitrary. `ours` has exact ties. What is timed is checked first: the same
weights wherever the ids agree, and the ids of a stable sort.

Calls take turns over many inputs: routed again and again, the same rows teach the CPU's branch
predictor the way through sort and top-k, which then seem to take down to an eighth of their time.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

import about
import torch

import moe_routing
from moe_routing.bench.route._formulas import one_hot

if TYPE_CHECKING:
    from collections.abc import Callable

E, K = 128, 8
SETS_ELEMENTS = 1 << 22
"""Logits of all inputs that take turns."""
ROUTE = moe_routing.get_router("gemma4", backend="eager")


def topk_first(
    logits: torch.Tensor, k: int, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weigh the chosen ones only."""
    values, ids = torch.topk(logits, k, dim=-1)
    return torch.softmax(values, -1, dtype=torch.float32) * scale[ids], ids.to(torch.int32)


CONTENDERS: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    "one-hot": one_hot,
    "top-k first": topk_first,
    "ours": ROUTE,
}


def check(logits: torch.Tensor, scale: torch.Tensor) -> None:
    """Raise unless what is about to be timed is right."""
    weights, ids = ROUTE(logits, K, scale)
    expected = logits.float().sort(dim=-1, descending=True, stable=True).indices[:, :K]
    if not torch.equal(ids.long(), expected):
        msg = "ours: ids differ from those of a stable sort"
        raise AssertionError(msg)
    torch.testing.assert_close(
        weights,
        logits.float().gather(-1, expected).softmax(-1) * scale[expected],
        rtol=2e-6,
        atol=1e-12,
    )


def rounds(
    inputs: list[torch.Tensor], scale: torch.Tensor, seconds: float
) -> dict[str, list[float]]:
    """Time every contender in turn, again and again, so that a noisy moment meets all of them.

    Return microseconds a call.
    """
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    calls = max(1, 20_000 // inputs[0].numel())
    for contender in CONTENDERS.values():
        contender(inputs[0], K, scale)
    end, turns = time.perf_counter() + seconds, itertools.cycle(inputs)
    while time.perf_counter() < end or len(times["ours"]) < 5:  # noqa: PLR2004 -- fewer say nothing about the spread
        for name, contender in CONTENDERS.items():
            some = list(itertools.islice(turns, calls))
            start = time.perf_counter()
            for logits in some:
                contender(logits, K, scale)
            times[name].append((time.perf_counter() - start) / calls * 1e6)
    return times


def main() -> None:
    """Measure, print a table, keep the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tokens", default="1,16,64,256,4096,65536")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each size and dtype")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    scale, rows = torch.rand(E), []
    print(
        f"{'dtype':9} {'T':>6} "
        + "".join(f"{name:>22}" for name in CONTENDERS)
        + f"{'ours / top-k':>14} {'one-hot / ours':>15}"
    )
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in map(int, arguments.tokens.split(",")):
            sets = min(max(SETS_ELEMENTS // (tokens * E), 2), 4096)
            inputs = [torch.randn(tokens, E).to(dtype) for _ in range(sets)]
            check(inputs[0], scale)
            times = rounds(inputs, scale, arguments.seconds)
            median = {name: statistics.median(each) for name, each in times.items()}
            spread = {
                name: (statistics.quantiles(each, n=4)[2] - statistics.quantiles(each, n=4)[0]) / 2
                for name, each in times.items()
            }
            name = str(dtype).removeprefix("torch.")
            rows.append({"dtype": name, "tokens": tokens, "median_us": median, "spread_us": spread})
            print(
                f"{name:9} {tokens:>6} "
                + "".join(f"{median[c]:>14.1f} ± {spread[c]:<5.0f}" for c in CONTENDERS)
                + f"{median['ours'] / median['top-k first']:>14.2f} "
                + f"{median['one-hot'] / median['ours']:>15.1f}"
            )
    if arguments.json:
        about.write(
            arguments.json,
            "eager on the CPU, one thread, E=128 K=8, microseconds a call",
            rows=rows,
        )


if __name__ == "__main__":
    main()
