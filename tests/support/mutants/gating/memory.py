"""Clauses 4, 6, 7 and 11: memory, batches, and what a kernel keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moe_routing.formula.gate import logits as formula
from mutants.gating._mutant import Fused, Projects, caught_by

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.gating import GateProblem, Projection
    from moe_routing.kernel import RoutingOutput
    from moe_routing_registry import DeviceInfo

FAR = r"row \d+: the logit of expert \d+ is .*, exactly .*; right are .* to "


@caught_by("operands_of_any_strides_are_read_as_they_lie", saying=FAR)
class RowsSideBySide(Projects):
    """Reads rows as if they were contiguous."""

    def read(self, projection: Projection) -> Projection:
        hidden = projection.hidden
        T, H = hidden.shape
        if hidden.untyped_storage().nbytes() // hidden.itemsize < hidden.storage_offset() + T * H:
            return projection
        return projection._replace(hidden=hidden.as_strided((T, H), (H, 1)))


@caught_by("operands_of_any_strides_are_read_as_they_lie", saying=r"hidden was changed")
class NormsInPlace(Projects):
    """Writes what it norms over the hidden states."""

    def add(self, projection: Projection) -> Tensor:
        made = super().add(projection)
        if projection.eps is not None:
            projection.hidden.mul_(0.5)
        return made


@caught_by("vectors_of_every_dtype_are_read", saying=FAR)
class VectorsInBfloat16(Projects):
    """Reads vectors as bfloat16."""

    def read(self, projection: Projection) -> Projection:
        short = {
            name: getattr(projection, name).bfloat16()
            for name in ("router_bias", "norm_weight", "input_scale")
            if getattr(projection, name) is not None
        }
        return projection._replace(**short)


@caught_by(
    "a_row_has_the_same_bits_in_any_batch",
    saying=r"(permuted|in a batch of \d+|apart in memory): logits has other bits in \d+ rows",
)
class PyTorchsOrder(Projects):
    """Adds in the order of PyTorch's float32 product, and says that it is always the same."""

    def add(self, projection: Projection) -> Tensor:
        return formula(projection, torch.float32)


@caught_by("a_row_has_the_same_bits_in_any_batch", saying=r"logits has other bits in \d+ rows")
class AnotherSliceForFewTokens(Projects):
    """Adds slices whose length depends on the number of tokens."""

    def add(self, projection: Projection) -> Tensor:
        hidden = projection.hidden
        if projection.eps is not None or projection.router_bias is not None:
            return super().add(projection)
        total = torch.zeros(len(hidden), len(projection.router_weight))
        length = 64 if len(hidden) <= 64 else 256
        for first in range(0, hidden.shape[1], length):
            part = torch.zeros_like(hidden)
            part[:, first : first + length] = hidden[:, first : first + length]
            total += super().add(projection._replace(hidden=part))
        return total


@caught_by("the_same_call_gives_the_same_bits", saying=r"run \d+ of 20: logits has other bits")
class InAnyOrder(Projects):
    """Adds columns in the order in which they arrive."""

    def __init__(self, problem: GateProblem, device: DeviceInfo) -> None:
        super().__init__(problem, device)
        self.calls = 0

    def add(self, projection: Projection) -> Tensor:
        self.calls += 1
        turn = torch.randperm(
            projection.hidden.shape[1], generator=torch.Generator().manual_seed(self.calls)
        )
        columns = {
            name: part[..., turn]
            for name in ("hidden", "router_weight", "norm_weight", "input_scale")
            if (part := getattr(projection, name)) is not None
        }
        return formula(projection._replace(**columns), torch.float32)


@caught_by("operands_changed_in_place_are_read_again", saying=r"after input_scale changed: " + FAR)
class FoldsTheScaleOnce(Projects):
    """Keeps the input scale of its first call."""

    def __init__(self, problem: GateProblem, device: DeviceInfo) -> None:
        super().__init__(problem, device)
        self.kept: dict[int, Tensor] = {}

    def read(self, projection: Projection) -> Projection:
        scale = projection.input_scale
        if scale is None:
            return projection
        return projection._replace(
            input_scale=self.kept.setdefault(scale.data_ptr(), scale.clone())
        )


@caught_by(
    "eight_threads_may_share_a_gate", saying=r"thread \d of 8: \w+ has other bits|the logit of"
)
class OneBufferForAll(Projects):
    """Adds up in one buffer, whoever calls."""

    def __init__(self, problem: GateProblem, device: DeviceInfo) -> None:
        super().__init__(problem, device)
        self.buffer = torch.empty(0)

    def write(self, made: Tensor, logits: Tensor) -> None:
        self.buffer = made
        for _ in range(200):  # a long kernel, in which other threads come to write
            made = made.clone()
        super().write(self.buffer, logits)


@caught_by("each_call_uses_its_own_inputs_in_stream_order", saying=r"row \d+: (ids?|weight of id) ")
class TheSameOutputAgain(Fused):
    """Returns the memory of its last call."""

    def __init__(self, problem: GateProblem, device: DeviceInfo) -> None:
        super().__init__(problem, device)
        self.kept: dict[int, RoutingOutput] = {}

    def route(self, logits: Tensor, **operands: Any) -> RoutingOutput:
        made = super().route(logits, **operands)
        kept = self.kept.setdefault(len(logits), made)
        kept.weights.copy_(made.weights)
        kept.ids.copy_(made.ids)
        return kept
