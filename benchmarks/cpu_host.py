"""What the host side costs on a CPU.

The router around a bound kernel, and the operator that traced callers go through.

    python benchmarks/cpu_host.py [--json FILE]

The kernel is replaced by one that returns the same two tensors, so that what is left is the way to
it: `router`, a plain call; `router, padded`, one with num_valid_tokens; `router, out=`, one with
outputs, whose addresses are looked at; `operator`, `torch.ops.moe_routing.route` as compiled code
calls it. `smallest operator` takes one tensor and returns two, defined like ours: what
torch.library itself asks. `eager` is a whole plain call, and `eager, training step` one with
gradients, forward and backward. Microseconds of process time a call, best of 15.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

import about
import torch

import moe_routing
from moe_routing._dispatch import dispatcher_of

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


class DoNothing:
    """Stands in for a kernel that prepares for calls like an earlier one."""

    __call__ = staticmethod(do_nothing)

    def prepared(self, _operands: object) -> Callable[..., moe_routing.RoutingOutput]:
        """Return what does nothing either."""
        return lambda _operands: SAME


def main() -> None:
    """Measure, print, keep the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    route, eager = (
        moe_routing.get_router("gemma4"),
        moe_routing.get_router("gemma4", backend="eager"),
    )
    spec = route.spec.to_json()
    dispatcher = dispatcher_of(spec, None)
    real = dispatcher.resolve("cpu", torch.float32, 128, 8)
    stand_in = real._replace(kernel=DoNothing())
    dispatcher._resolved = dict.fromkeys(dispatcher._resolved, stand_in)  # noqa: SLF001 -- the kernel is what is taken out
    trained, valid, ones = LOGITS.clone().requires_grad_(), torch.tensor([1]), torch.ones(1, 8)
    library = torch.library.Library("moe_routing_benchmark", "DEF")
    library.define("smallest(Tensor x) -> (Tensor, Tensor)")
    library.impl("smallest", lambda _x: SAME, "CompositeExplicitAutograd")
    library.impl("smallest", torch.library.fallthrough_kernel, "Autograd")
    smallest, operator = (
        torch.ops.moe_routing_benchmark.smallest.default,
        torch.ops.moe_routing.route.default,
    )
    ways: dict[str, Callable[[], object]] = {
        "the kernel itself": lambda: do_nothing(LOGITS, per_expert_scale=SCALE),
        "router": lambda: route(LOGITS, 8, SCALE),
        "router, padded": lambda: route(LOGITS, 8, SCALE, num_valid_tokens=valid),
        "router, out=": lambda: route(LOGITS, 8, SCALE, out=SAME),
        "eager": lambda: eager(LOGITS, 8, SCALE),
        "operator": lambda: operator(
            LOGITS, SCALE, None, None, None, None, None, spec, 8, SMALL_IDS, None
        ),
        "smallest operator": lambda: smallest(LOGITS),
        "two torch.empty": lambda: (torch.empty(1, 8), torch.empty(1, 8, dtype=torch.int32)),
    }
    with torch.no_grad():
        measured = {name: round(cost(way), 2) for name, way in ways.items()}
    measured["eager, training step"] = round(
        cost(lambda: eager(trained, 8, SCALE).weights.backward(ones)), 2
    )
    for name, microseconds in measured.items():
        print(f"{name:>24} {microseconds:8.2f} us")
    if arguments.json:
        about.write(
            arguments.json,
            "host cost on a CPU, microseconds of process time a call, best of 15",
            us=measured,
        )


if __name__ == "__main__":
    main()
