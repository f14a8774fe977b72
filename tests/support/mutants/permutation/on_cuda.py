"""What goes wrong on CUDA devices alone: synchronisation, streams, graphs, two devices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mutants.permutation._mutant import Combines, Permutes, caught_by

if TYPE_CHECKING:
    from torch import Tensor


class _LooksAtTheRows:
    """Asks the device whether the rows are zero."""

    def read(self, rows: Tensor) -> Tensor:
        return rows.clone() if bool(rows.view(torch.uint8).any()) else rows


@caught_by("nothing_is_read_on_the_host", saying="synchroniz", only_on="cuda")
class PermutesAndLooks(_LooksAtTheRows, Permutes):
    """Permutes so."""


@caught_by("nothing_is_read_on_the_host", saying="synchroniz", only_on="cuda")
class CombinesAndLooks(_LooksAtTheRows, Combines):
    """Combines so."""


class _KeptForGraphs:
    """Keeps a copy of the first rows, and takes these while a graph is captured."""

    kept: Tensor | None = None

    def read(self, rows: Tensor) -> Tensor:
        if self.kept is None or self.kept.shape != rows.shape:
            self.kept = rows.clone()
        return self.kept if torch.cuda.is_current_stream_capturing() else rows


REPLAYED = r"^(rows|scales|out): \d+ of"


@caught_by("a_cuda_graph_replays_with_new_operands", saying=REPLAYED, only_on="cuda")
class PermutesWhatItKeptForGraphs(_KeptForGraphs, Permutes):
    """Permutes so."""


@caught_by("a_cuda_graph_replays_with_new_operands", saying=REPLAYED, only_on="cuda")
class CombinesWhatItKeptForGraphs(_KeptForGraphs, Combines):
    """Combines so."""


class _OneWorkspace:
    """Works in a buffer of its own, whatever the stream."""

    workspace: Any = None

    def read(self, rows: Tensor) -> Tensor:
        if self.workspace is None or self.workspace.shape != rows.shape:
            self.workspace = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
        self.workspace.copy_(rows)
        torch.cuda._sleep(1_000_000)  # so that the other stream has the time to write
        return self.workspace


TWO_STREAMS = "^on two streams at once: "
TWO_GRAPHS = "^two graphs at once: "


@caught_by("calls_on_two_streams_do_not_meet", saying=TWO_STREAMS, only_on="cuda")
@caught_by("two_graphs_replayed_at_once_do_not_meet", saying=TWO_GRAPHS, only_on="cuda")
class PermutesInOneWorkspace(_OneWorkspace, Permutes):
    """Permutes so."""


@caught_by("calls_on_two_streams_do_not_meet", saying=TWO_STREAMS, only_on="cuda")
@caught_by("two_graphs_replayed_at_once_do_not_meet", saying=TWO_GRAPHS, only_on="cuda")
class CombinesInOneWorkspace(_OneWorkspace, Combines):
    """Combines so."""


class _LeavesTheDeviceCurrent:
    """Makes the rows' device the current one."""

    def read(self, rows: Tensor) -> Tensor:
        torch.cuda.set_device(rows.device)
        return rows


@caught_by("the_rows_device_is_used", saying="current device was changed", only_on="two devices")
class PermutesAndLeavesTheDevice(_LeavesTheDeviceCurrent, Permutes):
    """Permutes so."""


@caught_by("the_rows_device_is_used", saying="current device was changed", only_on="two devices")
class CombinesAndLeavesTheDevice(_LeavesTheDeviceCurrent, Combines):
    """Combines so."""
