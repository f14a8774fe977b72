"""One round of timing, for each mode.

What ``triton.testing`` and ``torch.utils.benchmark`` time, they time.
"""

from __future__ import annotations

import time
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch.utils.benchmark import Timer

from moe_routing.bench._implementation import turns

if TYPE_CHECKING:
    from collections.abc import Callable

    from moe_routing.bench._implementation import Implementation, Inputs

ROUNDS = 5
"""Rounds of a configuration.

Those of different implementations take turns, so that a noisy moment meets all of them.
"""
GRAPH_MILLISECONDS = 4
CALL_MILLISECONDS = 20
CPU_SECONDS = 0.05
HOST_BLOCKS, HOST_CALLS = 10, 40
"""Few calls at a time, between synchronisations: a queue that is full makes the host wait."""
COPIED = {"cpu": 1 << 26}
"""Bytes of the copy; 1 GiB on every other device."""
_MICROSECONDS = 1e6


def refusal(mode: str, implementation: Implementation) -> str:
    """Say why an implementation is not timed in a mode, ``""`` where it is."""
    return implementation.not_captured if mode == "graph" else ""


def round_of(mode: str, implementation: Implementation, inputs: Inputs) -> float:
    """Return the median microseconds of a call in one round."""
    device = inputs.given[0].device
    if mode == "graph":
        return graph(_rotating(implementation, inputs), device)
    if mode == "host":
        return host(_one(implementation, inputs))
    return call(_rotating_calls(implementation, inputs), device)


def graph(work: Callable[[], object], device: torch.device) -> float:
    """Capture it some hundred times in a CUDA graph, and time replays."""
    from triton import testing

    with torch.cuda.device(device):
        return (
            float(testing.do_bench_cudagraph(work, rep=GRAPH_MILLISECONDS, return_mode="median"))
            * 1e3
        )


def call(work: Callable[[], object], device: torch.device) -> float:
    """Time whole calls: on a GPU by its own clock, its cache emptied before each.

    On a CPU by the wall's.
    """
    if device.type in ("cuda", "xpu"):
        try:
            from triton import testing
        except ImportError:
            pass  # Timer synchronises the device itself
        else:
            with torch.get_device_module(device).device(device):
                return (
                    float(
                        testing.do_bench(
                            work, warmup=5, rep=CALL_MILLISECONDS, return_mode="median"
                        )
                    )
                    * 1e3
                )
    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=CPU_SECONDS).median * _MICROSECONDS


def host(work: Callable[[], object]) -> float:
    """Time the calls as the host sees them: nobody waits for the device while the clock runs."""
    timer = Timer(
        "work()",
        globals={"work": work},
        timer=time.perf_counter,
        num_threads=torch.get_num_threads(),
    )
    blocks = []
    for _ in range(HOST_BLOCKS):
        torch.accelerator.synchronize()
        blocks.append(timer.timeit(HOST_CALLS).median)
    return median(blocks) * _MICROSECONDS


def copy_rate(device: torch.device) -> float:
    """Return the bytes a second that a copy on the device reads and writes.

    Nothing can move its bytes faster.
    """
    size = COPIED.get(device.type, 1 << 30)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = [call(lambda: target.copy_(source), device) for _ in range(ROUNDS)]
    return 2 * size / median(times) * _MICROSECONDS


def launch_floor(mode: str, device: torch.device) -> float:
    """Return the microseconds of the smallest launch.

    An empty kernel in a graph, else PyTorch's operation on one element.
    """
    one = torch.ones(1, device=device)
    if mode == "graph":
        from moe_routing.bench.full_sort import empty_kernel

        times = [graph(lambda: empty_kernel[1,](num_warps=1), device) for _ in range(ROUNDS)]
    else:
        times = [
            host(one.neg_) if mode == "host" else call(one.neg_, device) for _ in range(ROUNDS)
        ]
    return median(times)


def _one(implementation: Implementation, inputs: Inputs) -> Callable[[], object]:
    given = inputs.given[0]
    return lambda: implementation.call(given)


def _rotating(implementation: Implementation, inputs: Inputs) -> Callable[[], object]:
    """Write outputs that are there, where the implementation can.

    The time is the kernels' alone.
    """
    round_the_sets = turns(inputs)
    into = implementation.into
    if into is None:
        return lambda: implementation.call(next(round_the_sets)[0])
    return lambda: into(*next(round_the_sets))


def _rotating_calls(implementation: Implementation, inputs: Inputs) -> Callable[[], object]:
    round_the_sets = turns(inputs)
    return lambda: implementation.call(next(round_the_sets)[0])
