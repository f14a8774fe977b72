"""``plan`` in plain PyTorch.

On a CPU the sorted layout is written straight into the outputs, in as few calls as it takes: with
few tokens each call costs more than its work (``benchmarks/cpu_plan.py``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from moe_routing.formula.plan import plan

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.planning import DispatchPlan, PlanKernel, PlanProblem
    from moe_routing_registry import DeviceInfo

RADIX_FROM = 1 << 15
"""Numbers from which PyTorch sorts integers by radix, a pass for each byte.

Fewer are compared, which takes the same time for every dtype.
"""
FILLED_FROM = 1 << 13
"""Pairs from which sorting ``RADIX_FROM`` numbers by radix takes less time than comparing these."""
MOST_IN_BYTES = 255
"""The highest key of a byte. With E = 256 those of experts fit, and that of no expert does not."""


def build(problem: PlanProblem, device: DeviceInfo) -> PlanKernel:
    """Make the kernel; there is nothing to compile."""
    if device.platform == "cpu" and problem.layout == "sorted" and problem.drop == "nothing":
        return SortedOnCpu(problem)

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


class SortedOnCpu:
    """A ``PlanKernel`` for the sorted layout on a CPU.

    An id of an expert keeps its bits as a key; every other id becomes E. Seen as unsigned numbers,
    negative ids are above E too, so one minimum replaces them all. PyTorch has no minimum of
    unsigned numbers; flipping the sign bit of signed ones gives the same order.
    """

    def __init__(self, problem: PlanProblem) -> None:
        """Keep what every call needs."""
        dtype: torch.dtype = getattr(torch, problem.ids_dtype)
        lowest = torch.iinfo(dtype).min
        self._experts = experts = problem.num_experts
        # Tensors, because PyTorch makes one of a Python number at every call.
        self._sign = torch.tensor(lowest, dtype=dtype, device="cpu")
        self._none = torch.tensor(lowest + experts, dtype=dtype, device="cpu")
        self._every = torch.arange(lowest, lowest + experts + 1, dtype=dtype, device="cpu")

    def __call__(
        self,
        ids: Tensor,
        out: DispatchPlan,
        *,
        capacity: int | None = None,  # noqa: ARG002 -- of problems that drop
        weights: Tensor | None = None,  # noqa: ARG002 -- likewise
    ) -> None:
        """Fill ``out``; see ``PlanKernel``."""
        keys = torch.bitwise_xor(ids.reshape(-1), self._sign).clamp_max_(self._none)
        starts, ends = out.offsets[:-1], out.offsets[1:]
        if len(keys) < FILLED_FROM:
            keys, order = keys.sort(stable=True)
            torch.searchsorted(keys, self._every, out_int32=True, out=out.offsets)
        else:
            keys, order = self._by_radix(keys)
            every = torch.arange(self._experts, dtype=keys.dtype, device="cpu")
            starts[:1].zero_()
            torch.searchsorted(keys, every, right=True, out_int32=True, out=ends)
        torch.sub(ends, starts, out=out.counts)
        out.order.copy_(order)
        places = torch.arange(len(order), dtype=torch.int32, device="cpu")
        out.inverse.view(-1).scatter_(0, order, places)

    def _by_radix(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Sort the lower bytes of the keys, in which the sign bit is not; return keys and order.

        A CPU may look at the keys: that waits for nothing.
        """
        pairs, highest = len(keys), self._experts
        if highest == MOST_IN_BYTES + 1 and bool(keys.max() < self._none):
            highest = MOST_IN_BYTES
        narrow = torch.uint8 if highest <= MOST_IN_BYTES else torch.int16
        keys = keys.to(narrow)
        if pairs < RADIX_FROM:
            # What is filled in has the highest key, and stands last, so that it stays there.
            keys = pad(keys, (0, RADIX_FROM - pairs), value=highest)
        keys, order = keys.sort(stable=True)
        return keys[:pairs], order[:pairs]
