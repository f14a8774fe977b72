"""What goes wrong on CUDA devices alone: synchronisation, streams, graphs, two devices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mutants.planning._mutant import Reference, caught_by

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.planning import DispatchPlan, PlanProblem
    from moe_routing_registry import DeviceInfo


@caught_by("nothing_is_read_on_the_host", saying="synchroniz", only_on="cuda")
class LooksForStrays(Reference):
    """Asks the device whether an id is outside [0, E)."""

    def read(self, ids: Tensor) -> Tensor:
        return ids.clone() if (ids < 0).any() else ids


@caught_by("a_cuda_graph_replays_with_new_ids", saying=r"^(order|counts): \d+ of", only_on="cuda")
class PlansWhatItKept(Reference):
    """Keeps a copy of the first ids, and plans that while a graph is captured."""

    def __init__(self, problem: PlanProblem, device: DeviceInfo) -> None:
        super().__init__(problem, device)
        self.kept: Tensor | None = None

    def read(self, ids: Tensor) -> Tensor:
        if self.kept is None or self.kept.shape != ids.shape:
            self.kept = ids.clone()
        return self.kept if torch.cuda.is_current_stream_capturing() else ids


@caught_by("calls_on_two_streams_do_not_meet", saying="^on two streams at once: ", only_on="cuda")
@caught_by(
    "two_graphs_replayed_at_once_do_not_meet", saying="^two graphs at once: ", only_on="cuda"
)
class OneWorkspace(Reference):
    """Works in a buffer of its own, whatever the stream."""

    def __init__(self, problem: PlanProblem, device: DeviceInfo) -> None:
        super().__init__(problem, device)
        self.workspace: Tensor | None = None

    def read(self, ids: Tensor) -> Tensor:
        if self.workspace is None or self.workspace.shape != ids.shape:
            self.workspace = torch.empty_like(ids, memory_format=torch.contiguous_format)
        self.workspace.copy_(ids)
        torch.cuda._sleep(1_000_000)  # so that the other stream has the time to write
        return self.workspace


@caught_by(
    "each_call_uses_its_own_ids_in_stream_order",
    saying=r"^(order|counts|inverse): \d+ of",
    only_on="cuda",
)
class OnAStreamOfItsOwn(Reference):
    """Plans on another stream than the current one, and does not wait for it."""

    def plan(self, ids: Tensor, capacity: int | None, weights: Tensor | None) -> DispatchPlan:
        with torch.cuda.stream(torch.cuda.Stream(ids.device)):
            return super().plan(ids, capacity, weights)


@caught_by("the_ids_device_is_used", saying="current device was changed", only_on="two devices")
class LeavesTheDeviceCurrent(Reference):
    """Makes the ids' device the current one."""

    def read(self, ids: Tensor) -> Tensor:
        torch.cuda.set_device(ids.device)
        return ids
