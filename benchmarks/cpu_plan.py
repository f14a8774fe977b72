"""The dispatch plan of the eager backend on the CPU, against what people write.

It runs in one thread, and prints medians and spread.

    python benchmarks/cpu_plan.py [--json FILE] [--tokens 1,8,64,512,4096,16384,65536]

`sort`: a stable sort, bincount, a cumulative sum and a scatter, with the int64 results that PyTorch
returns. `sort, int32`: the same, with the int32 results that kernels for experts take and that ours
are. Both are those of ``moe-routing bench plan``. Neither knows padding or other ranks' ids. All
results are compared before they are timed.

Calls take turns over many inputs, as in ``cpu_eager.py``, and the contenders take turns as well.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import about
import torch

import moe_routing
from moe_routing.bench.plan._implementations import by_sort, by_sort_int32

if TYPE_CHECKING:
    from collections.abc import Callable

K = 8
PAIRS = 1 << 19
"""Of all inputs that take turns."""
CONTENDERS: dict[str, Callable[[torch.Tensor, int], moe_routing.DispatchPlan]] = {
    "sort": by_sort,
    "sort, int32": by_sort_int32,
    "ours": partial(moe_routing.plan, backend="eager"),
}


def check(ids: torch.Tensor, num_experts: int) -> None:
    """Raise unless all contenders have the same results."""
    expected = by_sort_int32(ids, num_experts)
    for contender in CONTENDERS.values():
        for part, wanted in zip(contender(ids, num_experts), expected, strict=True):
            torch.testing.assert_close(part, wanted, rtol=0, atol=0, check_dtype=False)


def rounds(inputs: list[torch.Tensor], num_experts: int, seconds: float) -> dict[str, list[float]]:
    """Time every contender in turn, again and again; return microseconds a call."""
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    calls = max(1, 2_000 // inputs[0].numel())
    end, turns = time.perf_counter() + seconds, itertools.cycle(inputs)
    while time.perf_counter() < end or len(times["ours"]) < 5:  # noqa: PLR2004 -- fewer say nothing about the spread
        for name, contender in CONTENDERS.items():
            some = list(itertools.islice(turns, calls))
            start = time.perf_counter()
            for ids in some:
                contender(ids, num_experts)
            times[name].append((time.perf_counter() - start) / calls * 1e6)
    return times


def main() -> None:
    """Measure, print a table, keep the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tokens", default="1,8,64,512,4096,16384,65536")
    parser.add_argument("--experts", default="64,128,256,512")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each size")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    print(
        f"{'E':>4} {'T':>6} "
        + "".join(f"{name:>18}" for name in CONTENDERS)
        + f"{'sort / ours':>14} {'int32 / ours':>14}"
    )
    for experts, tokens in itertools.product(
        map(int, arguments.experts.split(",")), map(int, arguments.tokens.split(","))
    ):
        sets = min(max(PAIRS // (tokens * K), 2), 4096)
        inputs = [torch.rand(tokens, experts).topk(K).indices.int() for _ in range(sets)]
        check(inputs[0], experts)
        times = rounds(inputs, experts, arguments.seconds)
        median = {name: statistics.median(each) for name, each in times.items()}
        spread = {
            name: (statistics.quantiles(each, n=4)[2] - statistics.quantiles(each, n=4)[0]) / 2
            for name, each in times.items()
        }
        rows.append(
            {"experts": experts, "tokens": tokens, "median_us": median, "spread_us": spread}
        )
        print(
            f"{experts:>4} {tokens:>6} "
            + "".join(f"{median[c]:>10.1f} ± {spread[c]:<5.0f}" for c in CONTENDERS)
            + f"{median['sort'] / median['ours']:>14.2f} "
            + f"{median['sort, int32'] / median['ours']:>14.2f}"
        )
    if arguments.json:
        about.write(
            arguments.json,
            "eager's plan on the CPU, one thread, K=8, microseconds a call",
            rows=rows,
        )


if __name__ == "__main__":
    main()
