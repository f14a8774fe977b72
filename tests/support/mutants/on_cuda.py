"""What goes wrong on CUDA devices alone: synchronisation, graphs, and more than one device.

They route through ``eager``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moe_routing._registry import registry
from moe_routing.kernel import RoutingOutput
from mutants._mutant import caught_by

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing_registry import DeviceInfo, RoutingProblem


class Eager:
    """The right backend of the family here.

    It is the kernel of ``eager``, which reads nothing on the host.
    """

    def __init__(self, problem: RoutingProblem, device: DeviceInfo) -> None:
        self.kernel = registry().build("eager", problem, device)

    def __call__(self, logits: Tensor, **operands: Any) -> RoutingOutput:
        return self.kernel(logits, **operands)


@caught_by("nothing_is_read_on_the_host", "gemma4", saying="synchroniz", only_on="cuda")
class CountIsReadOnTheHost(Eager):
    """Asks the device how many tokens are valid."""

    def __call__(self, logits: Tensor, **operands: Any) -> RoutingOutput:
        if isinstance(operands.get("num_valid_tokens"), torch.Tensor):
            operands["num_valid_tokens"] = int(operands["num_valid_tokens"])
        return self.kernel(logits, **operands)


@caught_by("nothing_is_read_on_the_host", "gemma4", saying="synchroniz", only_on="cuda")
class LooksWhetherAnyIsNan(Eager):
    """Branches on what the logits hold."""

    def __call__(self, logits: Tensor, **operands: Any) -> RoutingOutput:
        if logits.isnan().any():
            logits = logits.clone()
        return self.kernel(logits, **operands)


@caught_by("a_cuda_graph_replays_with_new_inputs", "gemma4", saying="row", only_on="cuda")
class RoutesWhatItKept(Eager):
    """Keeps a copy of the first logits of a kind, and routes that while a graph is captured."""

    def __init__(self, problem: RoutingProblem, device: DeviceInfo) -> None:
        super().__init__(problem, device)
        self.kept: Tensor | None = None

    def __call__(self, logits: Tensor, **operands: Any) -> RoutingOutput:
        if self.kept is None or self.kept.shape != logits.shape:
            self.kept = logits.clone()
        return self.kernel(
            self.kept if torch.cuda.is_current_stream_capturing() else logits, **operands
        )


@caught_by("a_cuda_graph_replays_with_new_inputs", "gemma4", saying="padding", only_on="cuda")
class CountOfTheCapture(Eager):
    """Takes all tokens for valid while a graph is captured, where it cannot ask."""

    def __call__(self, logits: Tensor, **operands: Any) -> RoutingOutput:
        if torch.cuda.is_current_stream_capturing():
            operands["num_valid_tokens"] = None
        return self.kernel(logits, **operands)


@caught_by(
    "the_tensors_device_is_used",
    "gemma4",
    saying="weights: expected device cuda:1, got cuda:0",
    only_on="two devices",
)
class OutputsOnTheCurrentDevice(Eager):
    """Allocates its outputs on the current device."""

    def __call__(self, logits: Tensor, **operands: Any) -> RoutingOutput:
        output = self.kernel(logits, **operands)
        if operands.get("out") is not None:
            return output
        return RoutingOutput(
            *(tensor.to(torch.device("cuda", torch.cuda.current_device())) for tensor in output)
        )


@caught_by(
    "the_tensors_device_is_used",
    "gemma4",
    saying="current device was changed",
    only_on="two devices",
)
class LeavesTheDeviceCurrent(Eager):
    """Makes the logits' device the current one."""

    def __call__(self, logits: Tensor, **operands: Any) -> RoutingOutput:
        torch.cuda.set_device(logits.device)
        return self.kernel(logits, **operands)


_KEPT: dict[object, RoutingOutput] = {}
"""By shape and dtype, for all devices."""


@caught_by("one_router_serves_two_devices_in_turn", "gemma4", saying="row", only_on="two devices")
class OneBufferForAllDevices(Eager):
    """Serves a shape that it knows from what it computed last, wherever that was."""

    def __call__(self, logits: Tensor, **operands: Any) -> RoutingOutput:
        output = self.kernel(logits, **operands)
        kept = _KEPT.setdefault(
            (logits.shape, logits.dtype), RoutingOutput(*(tensor.clone() for tensor in output))
        )
        if operands.get("out") is not None and kept.ids.device != logits.device:
            output.weights.copy_(kept.weights)
            output.ids.copy_(kept.ids)
        return output
