"""Clauses 1 and 2: the order of pairs, and ids of no expert."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mutants.planning._mutant import Reference, caught_by

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.planning import DispatchPlan, PlanProblem
    from moe_routing_registry import DeviceInfo


@caught_by(
    "pairs_are_ordered_by_expert_token_and_slot",
    saying=r"^order: \d+ of \d+ are wrong, the first at \[\d+\]: expected \d+, got \d+$",
)
class Unstable(Reference):
    """Puts the pairs of an expert in descending order, as atomics may."""

    def plan(self, ids: Tensor, capacity: int | None, weights: Tensor | None) -> DispatchPlan:
        made = super().plan(ids.flip(0, 1), capacity, weights)
        pairs = ids.numel()
        order = torch.where(made.order < pairs, pairs - 1 - made.order, made.order)
        return made._replace(order=order, inverse=made.inverse.flip(0, 1))


@caught_by("pairs_are_ordered_by_expert_token_and_slot", saying=r"^(order|inverse): \d+ of")
class BySlotThenByToken(Reference):
    """Counts pairs down the columns."""

    def plan(self, ids: Tensor, capacity: int | None, weights: Tensor | None) -> DispatchPlan:
        tokens, topk = ids.shape
        made = super().plan(ids.t().reshape(tokens, topk), capacity, weights)
        pairs = ids.numel()
        there = made.order % max(1, tokens) * topk + made.order // max(1, tokens)
        order = torch.where(made.order < pairs, there, made.order)
        inverse = made.inverse.reshape(topk, tokens).t()
        return made._replace(order=order, inverse=inverse)


@caught_by("pairs_are_ordered_by_expert_token_and_slot", saying=r"^(order|counts): \d+ of")
class WholeWarpsOfExperts(Reference):
    """Above 512 experts, leaves out those past the last whole warp."""

    def read(self, ids: Tensor) -> Tensor:
        experts = self.problem.num_experts
        whole = experts // 32 * 32 if experts > 512 else experts
        return torch.where(ids < whole, ids, -1)


@caught_by("ids_of_every_distribution_are_planned", saying=r"^order: \d+ of")
class ReversesWhatDescends(Reference):
    """Reverses ids that descend rather than to sort them, which turns equal ones round."""

    def plan(self, ids: Tensor, capacity: int | None, weights: Tensor | None) -> DispatchPlan:
        made = super().plan(ids, capacity, weights)
        flat = ids.reshape(-1)
        if self.problem.layout == "sorted" and flat[0] > flat[-1] and (flat.diff() <= 0).all():
            made = made._replace(order=torch.arange(len(flat)).flip(0))
        return made


@caught_by("tokens_past_65_535_are_planned", saying=r"^(order|counts): \d+ of")
class TokensIn16Bits(Reference):
    """Leaves out tokens that a 16-bit number does not count."""

    def read(self, ids: Tensor) -> Tensor:
        token = torch.arange(len(ids))[:, None]
        return torch.where(token < 65536, ids, -1)


LISTED = {
    1, 2, 3, 7, 8, 20, 32, 33, 60, 64, 128, 160, 255, 256, 257, 300, 384, 512, 1000, 1024, 4096,
}  # fmt: skip
"""Numbers of experts in the kit's lists."""


@caught_by("drawn_calls_are_planned", saying=r"^(order|counts|inverse|num_dropped): \d+ of")
class NoneButTheKitsSizes(Reference):
    """Knows the numbers of experts that the kit lists, and no other."""

    def read(self, ids: Tensor) -> Tensor:
        known = self.problem.num_experts in LISTED
        return ids if known else torch.where(ids == ids[0, 0], -1, ids)


@caught_by("ids_of_no_expert_have_no_place", saying=r"^out: (order|counts): \d+ of")
class TwelveBitsOfAnId(Reference):
    """Looks at the low 12 bits of an int32 id: E is at most 4,096."""

    def read(self, ids: Tensor) -> Tensor:
        return torch.where(ids >= 4096, ids % 4096, ids) if ids.dtype == torch.int32 else ids


@caught_by(
    "ids_of_no_expert_have_no_place", saying=r"^counts: elements before or after it are changed$"
)
class CountsMinusOne(Reference):
    """Counts the id -1 in the element before the counts."""

    def write(self, made: DispatchPlan, out: DispatchPlan) -> None:
        super().write(made, out)
        offset = out.counts.storage_offset()
        if offset and self.padded:
            out.counts.as_strided((1,), (1,), offset - 1).add_(1)

    def read(self, ids: Tensor) -> Tensor:
        self.padded = bool((ids == -1).any())
        return ids


@caught_by("wide_ids_are_read_in_64_bits", saying=r"^out: (order|counts): \d+ of")
class IdsIn32Bits(Reference):
    """Reads the low half of an int64 id."""

    def read(self, ids: Tensor) -> Tensor:
        low = ids & 0xFFFFFFFF
        return torch.where(low >= 2**31, low - 2**32, low) if ids.dtype == torch.int64 else ids


@caught_by("ids_of_route_are_planned_as_they_are", saying=r"^(order|counts): \d+ of")
class RowsThatBeginElsewhereArePadding(Reference):
    """Takes a row for padding where its first expert is on another rank."""

    def __init__(self, problem: PlanProblem, device: DeviceInfo) -> None:
        super().__init__(problem, device)

    def read(self, ids: Tensor) -> Tensor:
        return ids.masked_fill(ids[:, :1] == -1, -1)
