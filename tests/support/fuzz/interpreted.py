"""The Triton kernels in Triton's interpreter, as a backend of the CPU: each problem by one of the variants that serve it.

Under its own name the backend takes the variant that is fast on a GPU: for as few tokens as are interpreted here, always one.
"""

from __future__ import annotations

import contextlib
import math
import random
from typing import TYPE_CHECKING

from moe_routing._registry import registry
from moe_routing_backends.triton import supports
from moe_routing_registry import BackendSpec, Target

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moe_routing_backends.triton.launch import TritonRouter
    from moe_routing_registry import DeviceInfo, RoutingProblem

INTERPRETED = "triton-interpreted"


def build(problem: RoutingProblem, device: DeviceInfo) -> TritonRouter:
    """Build for one launch, which the problem alone decides, so that a call that is run again takes the same."""
    from moe_routing_backends.triton.launch import TritonRouter
    from moe_routing_backends.triton.plan import Launch, can
    from moe_routing_backends.triton.table import VARIANTS, Step

    launches = [Launch(variant, 4, lanes, 1) for variant in VARIANTS for lanes in (1, 2, 4, 8)]
    able: dict[str, list[Launch]] = {}
    for launch in [Launch("lanes", 1, 1, 1), *launches]:
        if can(problem, launch) and (launch.variant != "lanes" or launch.lanes == 1):
            able.setdefault(launch.variant, []).append(launch)
    rng = random.Random(str(problem))  # noqa: S311 -- a test's choice
    return TritonRouter(problem, device, (Step(math.inf, rng.choice(able[rng.choice(list(able))])),))


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """Register the backend inside the block."""
    spec = BackendSpec(
        name=INTERPRETED,
        factories={"route": "fuzz.interpreted:build"},
        targets=(Target("cpu", explicit=True),),
        supports=supports,
    )
    registry().register(spec)
    try:
        yield
    finally:
        registry().unregister(spec.name)
