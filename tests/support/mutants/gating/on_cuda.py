"""What goes wrong on CUDA devices alone: synchronisation, streams, graphs, two devices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mutants.gating._mutant import Projects, caught_by
from mutants.gating.logits import FAR

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.gating import GateProblem, Projection
    from moe_routing_registry import DeviceInfo


@caught_by("nothing_is_read_on_the_host", saying="synchroniz", only_on="cuda")
class LooksForNan(Projects):
    """Asks the device whether a hidden state is NaN."""

    def read(self, projection: Projection) -> Projection:
        hidden = projection.hidden
        return projection._replace(hidden=hidden.clone() if hidden.isnan().any() else hidden)


class _Keeps(Projects):
    """Has a place for hidden states."""

    def __init__(self, problem: GateProblem, device: DeviceInfo) -> None:
        super().__init__(problem, device)
        self.kept: Tensor | None = None


@caught_by("a_cuda_graph_replays_with_new_inputs", saying=FAR, only_on="cuda")
class GatesWhatItKept(_Keeps):
    """Keeps a copy of the first hidden states, and gates that while a graph is captured."""

    def read(self, projection: Projection) -> Projection:
        hidden = projection.hidden
        if self.kept is None or self.kept.shape != hidden.shape:
            self.kept = hidden.clone()
        capturing = torch.cuda.is_current_stream_capturing()
        return projection._replace(hidden=self.kept if capturing else hidden)


@caught_by("calls_on_two_streams_do_not_meet", saying="^on two streams at once: ", only_on="cuda")
@caught_by(
    "two_graphs_replayed_at_once_do_not_meet", saying="^two graphs at once: ", only_on="cuda"
)
class OneWorkspace(_Keeps):
    """Works in a buffer of its own, whatever the stream."""

    def read(self, projection: Projection) -> Projection:
        hidden = projection.hidden
        if self.kept is None or self.kept.shape != hidden.shape:
            self.kept = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        self.kept.copy_(hidden)
        torch.cuda._sleep(1_000_000)  # so that the other stream has the time to write
        return projection._replace(hidden=self.kept)


@caught_by("the_tensors_device_is_used", saying="current device was changed", only_on="two devices")
class LeavesTheDeviceCurrent(Projects):
    """Makes the hidden states' device the current one."""

    def read(self, projection: Projection) -> Projection:
        torch.cuda.set_device(projection.hidden.device)
        return projection
