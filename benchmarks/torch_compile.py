"""Time the torch-compile backend on a CUDA device against compiling the reference formula.

It writes one JSON file.

Run from the repository's root: ``python benchmarks/torch_compile.py OUT.json``. E = 128, K = 8,
bfloat16, whole calls with allocation: by ``triton.testing.do_bench`` (the device's clock, with the
cache flushed before each call, during which the host runs ahead), and by the host's clock over 100
calls back to back. Also one router for several kinds of devices, and doctor's verification of the
backend for some seconds.
"""

from __future__ import annotations

import datetime as dt
import json
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import triton

from moe_routing import Router, RoutingOutput
from moe_routing.bench.route._formulas import one_hot
from moe_routing.conformance import quick
from moe_routing.families import FAMILIES
from moe_routing.reference.compare import compare

if TYPE_CHECKING:
    from collections.abc import Callable

GEMMA4 = FAMILIES["gemma4"].spec
MODES = ("default", "reduce-overhead", "max-autotune")
SIZES = (1, 64, 2048, 65536)
CHECKED = 512
"""Rows that are compared with the oracle."""
VERIFY_SECONDS = 10.0


def host_clock(call: Callable[[], object]) -> dict[str, float]:
    """Return microseconds a call, back to back: median, least and most of 15 times 100 calls."""
    samples = []
    for _ in range(15):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(100):
            call()
        torch.cuda.synchronize()
        samples.append((time.perf_counter() - start) / 100 * 1e6)
    return {
        "median": round(statistics.median(samples), 2),
        "least": round(min(samples), 2),
        "most": round(max(samples), 2),
    }


def device_clock(call: Callable[[], object]) -> dict[str, float]:
    """Return microseconds a call by ``do_bench``: median, and the 20 and 80 per cent quantiles."""
    low, median, high = triton.testing.do_bench(call, warmup=10, rep=60, quantiles=[0.2, 0.5, 0.8])
    return {
        "median": round(median * 1e3, 2),
        "q20": round(low * 1e3, 2),
        "q80": round(high * 1e3, 2),
    }


def timed(call: Callable[[], object]) -> dict[str, Any]:
    """Time a way to route by both clocks."""
    for _ in range(10):
        call()
    return {"do_bench": device_clock(call), "back_to_back": host_clock(call)}


def case(route: Router, tokens: int) -> dict[str, Any]:
    """Check and time our backend and every mode of the reference, for one number of tokens."""
    logits, scale = (
        torch.randn(tokens, 128, device="cuda", dtype=torch.bfloat16),
        torch.rand(128, device="cuda"),
    )
    out = route(logits, 8, scale)
    out = route(logits, 8, scale)  # the second call of a kind goes another way: this one is timed
    part = RoutingOutput(out.weights[:CHECKED], out.ids[:CHECKED])
    row: dict[str, Any] = {
        "T": tokens,
        "wrong": compare(GEMMA4, logits[:CHECKED], 8, part, per_expert_scale=scale).problems[:3],
    }
    row["torch-compile"] = timed(lambda: route(logits, 8, scale))
    for mode in MODES:
        torch._dynamo.reset()  # noqa: SLF001 -- one shape a time; there is no other name for it
        compiled = torch.compile(one_hot, mode=mode, dynamic=False)
        row[mode] = timed(lambda compiled=compiled: compiled(logits, 8, scale))
    for clock in ("do_bench", "back_to_back"):
        row[f"times_faster_{clock}"] = [
            round(row[m][clock]["median"] / row["torch-compile"][clock]["median"], 2) for m in MODES
        ]
    return row


def several_devices() -> dict[str, Any]:
    """Route on the CPU, the GPU and meta through one router; the ids must agree."""
    route = Router(GEMMA4)
    logits, scale = torch.randn(9, 128).bfloat16(), torch.rand(128)
    chosen, ids = {}, {}
    for device in ("cpu", "cuda:0", "meta", "cpu"):
        ids[device] = route(logits.to(device), 8, scale.to(device)).ids
        chosen[device] = route.backend
    return {"chosen": chosen, "same_ids": torch.equal(ids["cpu"], ids["cuda:0"].cpu())}


def main() -> None:
    """Run everything and write the results as they come."""
    target = Path(sys.argv[1])
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": dt.datetime.now(tz=dt.timezone.utc).date().isoformat(),
        "unit": "microseconds a call",
        "several_devices": several_devices(),
        "cases": [],
    }
    print(results["several_devices"], flush=True)
    route = Router(GEMMA4, backend="torch-compile")
    for tokens in SIZES:
        row = case(route, tokens)
        results["cases"].append(row)
        print(json.dumps(row), flush=True)
        target.write_text(json.dumps(results, indent=1) + "\n")
    quick.BUDGET_SECONDS = VERIFY_SECONDS
    found = quick.verify("torch-compile", "cuda:0")
    results["verified"] = {"checks": len(found), "wrong": [f.sentence for f in found if not f.ok]}
    print(results["verified"], flush=True)
    target.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
