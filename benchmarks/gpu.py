"""Time routing on a CUDA device against the full-sort kernel, eager PyTorch and torch.compile.

It writes one JSON file.

Run from the repository's root: ``python benchmarks/gpu.py OUT.json [--quick] [--kernels]``.
Microseconds a call: the median of CUDA-graph replays that rotate over 4 to 16 input sets, as in a
serving engine, alone and behind a linear layer; and host time of a plain call. Every case is
checked against the float64 oracle before it is timed. Kernels are compiled before that, in as many
processes as there are cores. ``--kernels`` leaves out whole calls against torch.compile, which take
minutes.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import triton
from full_sort import full_sort

from moe_routing import Router, RoutingOutput
from moe_routing.bench.route._formulas import one_hot
from moe_routing.reference.compare import compare
from moe_routing_registry import RoutingSpec

if TYPE_CHECKING:
    from collections.abc import Callable

GEMMA4 = RoutingSpec(family="gemma4", renormalize=True, per_expert_scale=True)
SPECS = {
    "gemma4": GEMMA4,
    "softmax": RoutingSpec(family="softmax_topk"),
    "softmax_renorm": RoutingSpec(family="softmax_topk", renormalize=True),
    "sigmoid": RoutingSpec(family="sigmoid_topk", score="sigmoid", renormalize=True),
    "sigmoid_bias": RoutingSpec(
        family="sigmoid_bias_topk", score="sigmoid", selection="scores_plus_bias",
        renormalize=True, scale=2.0,
    ),
    "deepseek_v3": RoutingSpec(
        family="grouped_sigmoid_bias", score="sigmoid", selection="scores_plus_bias",
        renormalize=True, renorm_epsilon=1e-20, scale=2.5,
        num_groups=8, topk_groups=4, group_sum=2,
    ),
    "sqrtsoftplus_bias": RoutingSpec(
        family="sqrtsoftplus_bias", score="sqrtsoftplus", selection="scores_plus_bias",
        renormalize=True, scale=1.5,
    ),
}  # fmt: skip
FLOAT = {"bfloat16": torch.bfloat16, "float32": torch.float32}
ALL = (1, 16, 64, 512, 4096, 16384, 65536, 250_000)
FEW = (1, 64, 4096, 65536)
SIZES = [
    ("gemma4", 128, 8, ALL),
    ("gemma4", 256, 8, FEW),
    ("gemma4", 512, 10, FEW),
    ("gemma4", 160, 6, FEW),
]
OTHERS = [(name, 128, 8, FEW) for name in SPECS if name not in ("gemma4", "deepseek_v3")]
OTHERS += [
    ("deepseek_v3", 256, 8, FEW),
    ("sigmoid_bias", 256, 8, FEW),
    ("sigmoid_bias", 384, 8, FEW),
]
HIDDEN = 2816
"""Width of the linear layer in front of Gemma4's routing."""


def graph_time(call: Callable[[int], object], sets: int, repeats: int = 20) -> float:
    """Return the median microseconds of a call inside a replayed CUDA graph of ``sets`` calls."""
    for i in range(sets):
        call(i)
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(sets):
            call(i)
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / sets)
    return round(statistics.median(times), 3)


def host_time(call: Callable[[], object]) -> float:
    """Return the median microseconds of CPU that a call takes, the queue kept short."""
    samples = []
    for _ in range(40):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(50):
            call()
        samples.append((time.perf_counter() - start) / 50 * 1e6)
    return round(statistics.median(samples), 2)


def case(  # noqa: PLR0913 -- what a case is
    name: str, experts: int, k: int, tokens: int, dtype: str, *, baseline: bool
) -> dict[str, Any]:
    """Check and time one case."""
    spec, sets = SPECS[name], 16 if tokens <= 4096 else 4  # noqa: PLR2004 -- so that the sets outgrow the L2 cache
    route = Router(spec, backend="triton")
    inputs = [torch.randn(tokens, experts, device="cuda").to(FLOAT[dtype]) for _ in range(sets)]
    outs = [
        RoutingOutput(
            torch.full((tokens, k), torch.nan, device="cuda"),
            torch.full((tokens, k), -7, device="cuda").int(),
        )
        for _ in range(sets)
    ]
    scale = torch.rand(experts, device="cuda") + 0.5
    operands: dict[str, Any] = {}
    if spec.per_expert_scale:
        operands["per_expert_scale"] = scale
    if spec.needs_bias:
        operands["bias"] = torch.randn(experts, device="cuda") * 0.1
    route(inputs[0], k, **operands, out=outs[0])
    part = min(tokens, 4096)
    first = RoutingOutput(outs[0].weights[:part], outs[0].ids[:part])
    found = compare(spec, inputs[0][:part], k, first, **operands)
    row: dict[str, Any] = {
        "spec": name,
        "dtype": dtype,
        "E": experts,
        "K": k,
        "T": tokens,
        "wrong": found.problems[:3],
    }
    row["us"] = graph_time(lambda i: route(inputs[i], k, **operands, out=outs[i]), sets)
    if baseline:
        row["full_sort_us"] = graph_time(lambda i: full_sort(inputs[i], k, scale, outs[i]), sets)
    return row


def behind_linear(tokens: int) -> dict[str, Any]:
    """Time the linear layer that gives Gemma4's logits, alone and with routing after it, in turns.

    All is bfloat16.
    """
    sets = 16 if tokens <= 64 else 4  # noqa: PLR2004 -- as many as fit a graph of a millisecond
    weight = torch.randn(128, HIDDEN, device="cuda", dtype=torch.bfloat16) / HIDDEN**0.5
    inputs = [torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16) for _ in range(sets)]
    outs = [
        RoutingOutput(
            torch.empty(tokens, 8, device="cuda"), torch.empty(tokens, 8, device="cuda").int()
        )
        for _ in range(sets)
    ]
    scale, route = torch.rand(128, device="cuda") + 0.5, Router(GEMMA4, backend="triton")
    linear = torch.nn.functional.linear
    ways: dict[str, Callable[[int], object]] = {
        "linear": lambda i: linear(inputs[i], weight),
        "full sort": lambda i: full_sort(linear(inputs[i], weight), 8, scale, outs[i]),
        "ours": lambda i: route(linear(inputs[i], weight), 8, scale, out=outs[i]),
    }
    times = [{name: graph_time(call, sets) for name, call in ways.items()} for _ in range(3)]
    return {"T": tokens, **{name: statistics.median(t[name] for t in times) for name in ways}}


def against_torch(tokens: int) -> dict[str, Any]:
    """Time whole calls of the router and of PyTorch's ways, allocation included.

    E = 128, K = 8, bfloat16.
    """
    logits = torch.randn(tokens, 128, device="cuda", dtype=torch.bfloat16)
    scale = torch.rand(128, device="cuda")
    route = Router(GEMMA4, backend="triton")
    ways: dict[str, Callable[[], object]] = {
        "ours": lambda: route(logits, 8, scale),
        "eager": lambda: one_hot(logits, 8, scale),
    }
    for mode in ("default", "reduce-overhead", "max-autotune"):
        compiled = torch.compile(one_hot, mode=mode, dynamic=False)
        ways[f"compile {mode}"] = lambda compiled=compiled: compiled(logits, 8, scale)
    ways["compiled caller of ours"] = torch.compile(lambda: route(logits, 8, scale), fullgraph=True)
    row: dict[str, Any] = {"T": tokens}
    for name, call in ways.items():
        for _ in range(5):
            call()
        row[name] = round(triton.testing.do_bench(call, return_mode="median") * 1e3, 2)
        torch._dynamo.reset()  # noqa: SLF001 -- one shape a time; there is no other name for it
    return row


def sized() -> list[tuple[str, int, int, tuple[int, ...], bool]]:
    """Return specs, sizes, numbers of tokens, and whether the full sort is timed too."""
    return [(*size, True) for size in SIZES] + [(*other, False) for other in OTHERS]


def compile_share(part: int, parts: int) -> None:
    """Compile a share of the kernels by a call each.

    The other processes of ``compile_all`` do the rest.
    """
    every = [(dtype, size, tokens) for dtype in FLOAT for size in sized() for tokens in size[3]]
    for dtype, (name, experts, k, _, baseline), tokens in every[part::parts]:
        logits, vector = (
            torch.zeros(tokens, experts, device="cuda", dtype=FLOAT[dtype]),
            torch.ones(experts, device="cuda"),
        )
        spec = SPECS[name]
        operands = (
            {"per_expert_scale": vector}
            if spec.per_expert_scale
            else {"bias": vector}
            if spec.needs_bias
            else {}
        )
        out = Router(spec, backend="triton")(logits, k, **operands)
        if baseline:
            full_sort(logits, k, vector, out)
    torch.cuda.synchronize()


def compile_all() -> None:
    """Fill Triton's cache."""
    parts = max(1, (os.cpu_count() or 1) - 1)
    share = [sys.executable, __file__, "--compile"]
    shares = [subprocess.Popen([*share, f"{part}/{parts}"]) for part in range(parts)]  # noqa: S603 -- this file itself
    if any(process.wait() for process in shares):
        sys.exit("a kernel did not compile, see above")


def main() -> None:
    """Run everything and write the results as they come."""
    if sys.argv[1] == "--compile":
        compile_share(*map(int, sys.argv[2].split("/")))
        return
    target, quick = Path(sys.argv[1]), "--quick" in sys.argv
    compile_all()
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": dt.datetime.now(tz=dt.timezone.utc).date().isoformat(),
        "unit": "microseconds a call, median of CUDA-graph replays over rotating inputs",
        "cases": [],
        "behind_linear": [],
        "whole_calls_do_bench": [],
    }
    for dtype in FLOAT:
        for name, experts, k, many, baseline in sized():
            for tokens in (1, 64) if quick else many:
                row = case(name, experts, k, tokens, dtype, baseline=baseline)
                results["cases"].append(row)
                print(*row.values(), flush=True)
            target.write_text(json.dumps(results, indent=1) + "\n")
    for tokens in (1, 16, 64, 512, 4096):
        results["behind_linear"].append(behind_linear(tokens))
        print(results["behind_linear"][-1], flush=True)
    logits, scale = (
        torch.randn(1, 128, device="cuda", dtype=torch.bfloat16),
        torch.rand(128, device="cuda"),
    )
    route = Router(GEMMA4, backend="triton")
    out = route(logits, 8, scale)
    results["host_us"] = {
        "route(logits, 8, scale)": host_time(lambda: route(logits, 8, scale)),
        "route(..., out=out)": host_time(lambda: route(logits, 8, scale, out=out)),
        "two torch.empty": host_time(lambda: (torch.empty_like(out[0]), torch.empty_like(out[1]))),
    }
    print(results["host_us"], flush=True)
    for tokens in () if quick or "--kernels" in sys.argv else (1, 64, 512, 2048, 8192, 65536):
        results["whole_calls_do_bench"].append(against_torch(tokens))
        print(results["whole_calls_do_bench"][-1], flush=True)
        target.write_text(json.dumps(results, indent=1) + "\n")
    target.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
