"""``plan`` in plain PyTorch, and on a CPU in NumPy where it is installed.

A call of NumPy's takes a tenth of the time of one of PyTorch's, which is most of a plan of few
tokens, and NumPy sorts 8 and 16 bits by radix from 17 numbers on (``benchmarks/cpu_plan.py``).
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from moe_routing.formula.plan import plan

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.planning import DispatchPlan, PlanKernel, PlanProblem
    from moe_routing_registry import DeviceInfo

RADIX_FROM = 1 << 16
"""Pairs from which PyTorch, which then sorts by radix too, and in all threads, takes less time."""
FEW = 1 << 10
"""Pairs up to which a look at the greatest key takes longer than it saves."""
MOST_IN_BYTES = 255
"""The highest key of a byte. With E = 256 those of experts fit, and that of no expert does not."""


def build(problem: PlanProblem, device: DeviceInfo) -> PlanKernel:
    """Make the kernel; there is nothing to compile."""
    plain = problem.layout == "sorted" and problem.drop == "nothing"
    if plain and device.platform == "cpu" and (numpy := _numpy()) is not None:
        return InNumpy(problem, numpy)

    def fill(
        ids: Tensor,
        out: DispatchPlan,
        *,
        capacity: int | None = None,
        weights: Tensor | None = None,
    ) -> None:
        for part, given in zip(plan(problem, ids, capacity, weights), out, strict=True):
            if part is not None and given is not None:
                given.copy_(part)

    return fill


@cache
def _numpy() -> Any:  # noqa: ANN401 -- the module
    """Return NumPy where it is installed, and this PyTorch shares memory with it."""
    try:
        import numpy as np

        torch.empty(0, device="cpu").numpy()
    except (ImportError, RuntimeError):
        return None
    return np


class InNumpy:
    """A ``PlanKernel`` for the sorted layout on a CPU, which writes straight into the outputs."""

    def __init__(self, problem: PlanProblem, numpy: Any) -> None:  # noqa: ANN401 -- the module
        """Keep what every call needs."""
        self._np = numpy
        self._experts = problem.num_experts
        self._unsigned = numpy.dtype(f"u{problem.ids_dtype}")

    def __call__(
        self,
        ids: Tensor,
        out: DispatchPlan,
        *,
        capacity: int | None = None,  # noqa: ARG002 -- of problems that drop
        weights: Tensor | None = None,  # noqa: ARG002 -- likewise
    ) -> None:
        """Fill ``out``; see ``PlanKernel``."""
        np, experts = self._np, self._experts
        # As unsigned numbers, negative ids are above E too; E stands for no expert.
        given = ids.numpy().reshape(-1).view(self._unsigned)
        keys = np.minimum(given, experts)
        fits = experts <= MOST_IN_BYTES or (
            experts == MOST_IN_BYTES + 1 and len(keys) > FEW and keys.max() <= MOST_IN_BYTES
        )
        keys = keys.astype(np.uint8 if fits else np.uint16)
        if len(keys) < RADIX_FROM:
            by_key = keys.argsort(kind="stable")
            out.order.numpy()[:] = by_key
            out.inverse.numpy().reshape(-1)[by_key] = np.arange(len(keys), dtype=np.int32)
        else:
            signed = keys if fits else keys.view(np.int16)
            order = torch.from_numpy(signed).sort(stable=True).indices
            out.order.copy_(order)
            places = torch.arange(len(keys), dtype=torch.int32, device="cpu")
            out.inverse.view(-1).scatter_(0, order, places)
        counts, offsets = out.counts.numpy(), out.offsets.numpy()
        counts[:] = np.bincount(keys, minlength=experts)[:experts]
        offsets[0] = 0
        np.cumsum(counts, out=offsets[1:])
