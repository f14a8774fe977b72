"""Host times on a CUDA device at T = 1, and times of gradients and of compiled callers.

    python benchmarks/gpu_host.py OUT.json [--old DIR]

`--old` names a checkout of another version, whose host times are measured in the same run, in
processes that take turns with this one's. Host times: medians over blocks of 50 calls between
synchronisations, so that the queue is never full. Gradients: the fused kernel and the closed form
in PyTorch, replayed in CUDA graphs, and whole calls of both. Compiled callers: a function with our
operator and the same function with a user's own Triton kernel, both compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import moe_routing

if TYPE_CHECKING:
    from collections.abc import Callable

E, K = 128, 8
BLOCKS, CALLS = 60, 50
SMALL_IDS = False
"""The operator's ``int64_ids``."""


def host(call: Callable[[], object]) -> float:
    """Return the median microseconds of the host's clock that a call takes."""
    for _ in range(100):
        call()
    samples = []
    for _ in range(BLOCKS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        samples.append((time.perf_counter() - start) / CALLS * 1e6)
    return round(statistics.median(samples), 2)


def calls() -> dict[str, float]:
    """Time whole calls of the router at T = 1."""
    logits, scale = (
        torch.randn(1, E, device="cuda", dtype=torch.bfloat16),
        torch.rand(E, device="cuda"),
    )
    route = moe_routing.get_router("gemma4", backend="triton")
    plain = moe_routing.get_router("sigmoid_bias_topk", backend="triton")
    bias = torch.randn(E, device="cuda")
    with torch.no_grad():
        out = route(logits, K, scale)
        bound = route.resolve("cuda", logits.dtype, E, K).kernel
        return {
            "route(logits, 8, scale)": host(lambda: route(logits, K, scale)),
            "route(logits, 8, scale, out=out)": host(lambda: route(logits, K, scale, out=out)),
            "sigmoid_bias_topk: route(logits, 8, bias=bias)": host(
                lambda: plain(logits, K, bias=bias)
            ),
            "the bound kernel with out=": host(
                lambda: bound(logits, per_expert_scale=scale, out=out)
            ),
        }


def parts() -> dict[str, float]:
    """Time what a call is made of."""
    from moe_routing import private_api

    logits, scale = (
        torch.randn(1, E, device="cuda", dtype=torch.bfloat16),
        torch.rand(E, device="cuda"),
    )
    route = moe_routing.get_router("gemma4", backend="triton")
    out = route(logits, K, scale)
    bound: Any = route.resolve("cuda", logits.dtype, E, K).kernel
    ready = next(iter(bound._compiled.launchers.values()))  # noqa: SLF001 -- the launch alone is what is timed
    pointers = (logits.data_ptr(), out.weights.data_ptr(), out.ids.data_ptr(), scale.data_ptr())
    arguments = (*pointers, None, None, None, None, None, 1, 1, E, 1, 0)
    stream = private_api.current_stream(0)
    return {
        "the launch alone": host(lambda: ready(1, stream, arguments)),
        "two allocations": host(
            lambda: (
                private_api.empty((1, K), (K, 1), torch.float32),
                private_api.empty((1, K), (K, 1), torch.int32),
            )
        ),
        "two torch.empty": host(
            lambda: (
                torch.empty(1, K, device="cuda"),
                torch.empty(1, K, device="cuda", dtype=torch.int32),
            )
        ),
        "current device and stream": host(
            lambda: (private_api.current_device(), private_api.current_stream(0))
        ),
        "an empty function": host(lambda: None),
    }


def gradient(model: str, experts: int, tokens: int) -> dict[str, Any]:
    """Time the fused backward kernel against the closed form."""
    from triton.testing import do_bench, do_bench_cudagraph

    from moe_routing.formula import weights_backward

    route = moe_routing.get_router(model, backend="triton")
    spec = route.spec
    logits = torch.randn(tokens, experts, device="cuda", dtype=torch.bfloat16)
    scale = torch.rand(experts, device="cuda") if spec.per_expert_scale else None
    bias = torch.randn(experts, device="cuda") * 0.1 if spec.needs_bias else None
    with torch.no_grad():
        ids = route(logits, K, scale, bias=bias).ids
    grad = torch.randn(tokens, K, device="cuda")
    bound: Any = route.resolve("cuda", logits.dtype, experts, K, training=True).kernel
    ways = {
        "fused": lambda: bound.backward(grad, logits, ids, scale),
        "closed form": lambda: weights_backward(spec, grad, logits, ids, scale),
    }
    fused, formula = (way() for way in ways.values())
    again = bound.backward(grad, logits, ids, scale)
    off = [
        float((a.float() - b.float()).abs().max())
        for a, b in zip(fused, formula, strict=True)
        if a.numel()
    ]
    row: dict[str, Any] = {
        "model": model, "E": experts, "K": K, "T": tokens, "dtype": "bfloat16",
        "same bits again": all(torch.equal(a, b) for a, b in zip(fused, again, strict=True)),
        "largest difference": max(off),
    }  # fmt: skip
    for way, call in ways.items():
        row[f"{way}, in a graph"] = round(
            do_bench_cudagraph(call, rep=10, return_mode="median") * 1e3, 2
        )
        row[f"{way}, called"] = round(
            do_bench(call, warmup=5, rep=20, return_mode="median") * 1e3, 2
        )
    return row


def gradients() -> list[dict[str, Any]]:
    """Time gradients of one spec of each kind: a scale, a softmax over the row, groups."""
    models = (("gemma4", 128), ("qwen2_moe", 128), ("deepseek_v3", 256))
    return [
        gradient(model, experts, tokens)
        for model, experts in models
        for tokens in (64, 4096, 65536)
    ]


def compiled_callers() -> dict[str, float]:
    """Time a compiled function with our operator, and one with a user's own Triton kernel."""
    from moe_routing.bench.full_sort import full_sort

    route = moe_routing.get_router("gemma4", backend="triton")
    logits = torch.randn(1, E, device="cuda", dtype=torch.bfloat16)
    scale = torch.rand(E, device="cuda")

    def ours(logits: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = route(logits * 2, K, scale)
        return weights + 1, ids

    def theirs(logits: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights = torch.empty(logits.shape[0], K, device="cuda")
        ids = torch.empty(logits.shape[0], K, device="cuda", dtype=torch.int32)
        full_sort(logits * 2, K, scale, (weights, ids))
        return weights + 1, ids

    found: dict[str, float] = {}
    with torch.no_grad():
        expected = ours(logits, scale)
        operator = torch.ops.moe_routing.route.default
        text = route.spec.to_json()
        found["the operator, called"] = host(
            lambda: operator(
                logits, scale, None, None, None, None, None, text, K, SMALL_IDS, "triton"
            )
        )
        for mode in ("default", "reduce-overhead"):
            for name, function in (("our operator", ours), ("a user's Triton kernel", theirs)):
                torch._dynamo.reset()  # noqa: SLF001 -- one function a time; there is no other name for it
                compiled = torch.compile(function, mode=mode, fullgraph=True)
                for _ in range(5):
                    got = compiled(logits, scale)
                if not torch.equal(got[1], expected[1]):
                    msg = f"{name} in {mode}: other ids"
                    raise AssertionError(msg)
                found[f"{name}, {mode}"] = host(lambda compiled=compiled: compiled(logits, scale))
    return found


def elsewhere(folder: Path) -> dict[str, float]:
    """Time whole calls of another checkout, in a process of its own."""
    path = os.pathsep.join([str(folder / part) for part in ("", "registry", "backends")])
    command = [sys.executable, str(Path(__file__).resolve()), "-", "--calls"]
    done = subprocess.run(  # noqa: S603 -- this Python, this script
        command, check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure, print, keep the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out")
    parser.add_argument("--old", type=Path)
    parser.add_argument("--calls", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.calls:
        print(json.dumps(calls()))
        return
    here = Path(moe_routing.__file__).parents[1]
    measured: dict[str, Any] = {"calls": [], "calls, old": []}
    for _ in range(3):
        measured["calls"].append(elsewhere(here))
        if arguments.old:
            measured["calls, old"].append(elsewhere(arguments.old))
    for name, part in (
        ("parts", parts),
        ("gradients", gradients),
        ("compiled callers", compiled_callers),
    ):
        measured[name] = part()
        print(name, json.dumps(measured[name], indent=1), flush=True)
    print(json.dumps({name: measured[name] for name in ("calls", "calls, old")}, indent=1))
    import about
    import triton

    info = moe_routing.probe("cuda")
    what = "host time of a call at T = 1, gradients, compiled callers; microseconds"
    machine = {"device": info.name, "driver": info.driver, "triton": triton.__version__}
    about.write(Path(arguments.out), what, **machine, **measured)


if __name__ == "__main__":
    main()
