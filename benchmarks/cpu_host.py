"""What the host side costs on a CPU: the router around a bound kernel, and the operator that traced callers go through.

    python benchmarks/cpu_host.py [--json FILE]

The bound kernel is replaced by one that returns the same two tensors, so that what is left is the way to it: `router`, an
ordinary call; `operator`, `torch.ops.moe_routing.route` as compiled code calls it. `smallest operator` takes one tensor and
returns two, defined like ours: what torch.library itself asks. Microseconds of process time a call, best of 15.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

import about
import torch

import moe_routing
from moe_routing import _op
from moe_routing._binding import Binding

if TYPE_CHECKING:
    from collections.abc import Callable

CALLS = 3000
SMALL_IDS = False
"""The operator's ``int64_ids``."""
LOGITS, SCALE = torch.randn(1, 128), torch.rand(128)
SAME = moe_routing.RoutingOutput(torch.rand(1, 8), torch.zeros(1, 8, dtype=torch.int32))


def cost(call: Callable[[], object]) -> float:
    """Return the best of 15 means, in microseconds of process time."""
    best = float("inf")
    for _ in range(15):
        start = time.process_time_ns()
        for _ in range(CALLS):
            call()
        best = min(best, (time.process_time_ns() - start) / CALLS / 1e3)
    return best


def do_nothing(_logits: torch.Tensor, **_operands: object) -> moe_routing.RoutingOutput:
    """Stand in for a kernel."""
    return SAME


def main() -> None:
    """Measure, print, keep the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    route = moe_routing.get_router("gemma4")
    spec = route.spec.to_json()
    for binder in (route._binder, _op.binder_of(spec, None)):  # noqa: SLF001 -- the kernel is what is taken out
        real = binder.binding_for("cpu", torch.float32, 128, 8)
        binder._bindings = dict.fromkeys(binder._bindings, Binding(do_nothing, real.report))  # noqa: SLF001 -- likewise
    library = torch.library.Library("moe_routing_benchmark", "DEF")
    library.define("smallest(Tensor x) -> (Tensor, Tensor)")
    library.impl("smallest", lambda _x: SAME, "CompositeExplicitAutograd")
    library.impl("smallest", torch.library.fallthrough_kernel, "Autograd")
    smallest, operator = torch.ops.moe_routing_benchmark.smallest.default, torch.ops.moe_routing.route.default
    ways: dict[str, Callable[[], object]] = {
        "the bound kernel itself": lambda: do_nothing(LOGITS, per_expert_scale=SCALE),
        "router": lambda: route(LOGITS, 8, SCALE),
        "operator": lambda: operator(LOGITS, SCALE, None, None, None, None, None, spec, 8, SMALL_IDS, None),
        "smallest operator": lambda: smallest(LOGITS),
        "two torch.empty": lambda: (torch.empty(1, 8), torch.empty(1, 8, dtype=torch.int32)),
    }
    with torch.no_grad():
        measured = {name: round(cost(way), 2) for name, way in ways.items()}
    for name, microseconds in measured.items():
        print(f"{name:>24} {microseconds:8.2f} us")
    if arguments.json:
        about.write(arguments.json, "host cost on a CPU, microseconds of process time a call, best of 15", us=measured)


if __name__ == "__main__":
    main()
