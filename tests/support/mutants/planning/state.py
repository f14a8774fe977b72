"""Clauses 8 and 10: what a kernel keeps between calls."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import torch

from mutants.planning._mutant import Reference, caught_by

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.planning import DispatchPlan, PlanProblem
    from moe_routing_registry import DeviceInfo


@caught_by("the_same_call_gives_the_same_bits", saying=r"^run \d+ of 50: order: \d+ of")
class TicketsThatRunOut(Reference):
    """After some calls in a thread, two places of an expert are taken in the other order."""

    def __init__(self, problem: PlanProblem, device: DeviceInfo) -> None:
        super().__init__(problem, device)
        self.calls = 0

    def write(self, made: DispatchPlan, out: DispatchPlan) -> None:
        super().write(made, out)
        self.calls += threading.current_thread() is threading.main_thread()
        if self.calls > 30:
            out.order.copy_(out.order.flip(-1))


@caught_by("operands_changed_in_place_are_read_again", saying=r"^weights changed in place: ")
class WeightsKept(Reference):
    """Keeps a copy of the weights of a call, and takes it for the same tensor's weights again."""

    def __init__(self, problem: PlanProblem, device: DeviceInfo) -> None:
        super().__init__(problem, device)
        self.seen: Tensor | None = None
        self.kept: Tensor | None = None

    def plan(self, ids: Tensor, capacity: int | None, weights: Tensor | None) -> DispatchPlan:
        if weights is not self.seen and weights is not None:
            self.seen, self.kept = weights, weights.clone()
        return super().plan(ids, capacity, self.kept)


@caught_by("operands_changed_in_place_are_read_again", saying="^another capacity: ")
class CapacityKept(Reference):
    """Is compiled for the first capacity."""

    def __init__(self, problem: PlanProblem, device: DeviceInfo) -> None:
        super().__init__(problem, device)
        self.capacity: int | None = None

    def plan(self, ids: Tensor, capacity: int | None, weights: Tensor | None) -> DispatchPlan:
        if self.capacity is None:
            self.capacity = capacity
        large = capacity is not None and capacity > 4
        return super().plan(ids, capacity if large else self.capacity, weights)


@caught_by("eight_threads_may_share_a_kernel", saying=r"^thread \d of 8: ")
class OneScratchForAllThreads(Reference):
    """Works in a buffer of its own, which all threads share."""

    scratch: Tensor | None = None

    def read(self, ids: Tensor) -> Tensor:
        if self.scratch is None or self.scratch.shape != ids.shape:
            self.scratch = torch.empty_like(ids, memory_format=torch.contiguous_format)
        scratch = self.scratch.copy_(ids)
        time.sleep(0)  # lets another thread in
        return scratch


@caught_by("each_call_uses_its_own_ids_in_stream_order", saying=r"^(order|counts): \d+ of")
class IdsKept(Reference):
    """Keeps a copy of the ids of a call, and takes it for the same tensor's ids again."""

    def __init__(self, problem: PlanProblem, device: DeviceInfo) -> None:
        super().__init__(problem, device)
        self.seen: Tensor | None = None
        self.kept: Tensor | None = None

    def read(self, ids: Tensor) -> Tensor:
        if ids is not self.seen:
            self.seen, self.kept = ids, ids.clone()
        return self.kept


@caught_by("the_operator_passes_opcheck", saying=r"^opcheck raises \w+: .*mutat")
class CountsInTheIds(Reference):
    """Counts with the ids, where they lie."""

    def write(self, made: DispatchPlan, out: DispatchPlan) -> None:
        super().write(made, out)
        self.ids.add_(1)

    def read(self, ids: Tensor) -> Tensor:
        self.ids = ids
        return ids
