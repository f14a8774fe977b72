"""The Triton kernels in Triton's interpreter, as a backend of the CPU.

One of the variants that serve a problem routes it.

Under its own name the backend takes the variant that is fast on a GPU: for as few tokens as are
interpreted here, always one.
"""

from __future__ import annotations

import contextlib
import math
import random
from typing import TYPE_CHECKING

from moe_routing._registry import registry
from moe_routing_backends import triton
from moe_routing_registry import BackendSpec, Target
from moe_routing_registry.problem import OPTIONAL_OPERANDS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moe_routing_backends.triton.runtime.router import TritonRouter
    from moe_routing_registry import DeviceInfo, RoutingProblem

INTERPRETED = "triton-interpreted"


def build(problem: RoutingProblem, device: DeviceInfo) -> TritonRouter:
    """Build the kernel with one launch, which the problem alone decides.

    So a call that is run again takes the same launch.
    """
    from moe_routing_backends.triton.kernels import OF_LAUNCHES, supports
    from moe_routing_backends.triton.kernels.spec import ANY_ROWS, Launch
    from moe_routing_backends.triton.runtime.router import TritonRouter
    from moe_routing_backends.triton.tuning.table import Step

    launches = [
        Launch(variant, 4, threads, 1) for variant in OF_LAUNCHES for threads in (1, 2, 4, 8)
    ]
    able: dict[str, list[Launch]] = {}
    for launch in [*(Launch(variant, 1, 1, 1) for variant in sorted(ANY_ROWS)), *launches]:
        if supports(problem, launch) and (
            launch.variant not in ANY_ROWS or launch.threads_per_row == 1
        ):
            able.setdefault(launch.variant, []).append(launch)
    rng = random.Random(str(problem))  # noqa: S311 -- a test's choice
    return TritonRouter(
        problem, device, (Step(math.inf, rng.choice(able[rng.choice(list(able))])),)
    )


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """Register the backend inside the block."""
    spec = BackendSpec(
        name=INTERPRETED,
        factories={"route": "fuzz.interpreted:build"},
        targets=(Target("cpu", explicit=True),),
        supports=triton.supports,
        operands=frozenset(OPTIONAL_OPERANDS),
    )
    registry().register(spec)
    try:
        yield
    finally:
        registry().unregister(spec.name)
