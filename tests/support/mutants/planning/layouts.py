"""Clauses 3, 4 and 5: blocks, capacities and the masked layout."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from moe_routing.formula.plan import plan
from mutants.planning._mutant import Reference, caught_by

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.planning import DispatchPlan, PlanProblem


@caught_by(
    "experts_begin_at_multiples_of_the_block", saying=r"^(order|offsets|inverse): \d+ of \d+"
)
class BlocksByMask(Reference):
    """Rounds up to the block as if that were a power of two."""

    def plan(self, ids: Tensor, capacity: int | None, weights: Tensor | None) -> DispatchPlan:
        made = super().plan(ids, capacity, weights)
        block = self.problem.block
        if self.problem.layout == "blocks" and block & (block - 1):
            rounded = (made.counts + block - 1) & ~(block - 1)
            made = made._replace(offsets=torch.nn.functional.pad(rounded.cumsum(0), (1, 0)))
        return made


@caught_by("experts_begin_at_multiples_of_the_block", saying=r"^order: .* expected \d+, got -1$")
class EmptyPlacesAreMinusOne(Reference):
    """Writes -1 where there is no pair."""

    def write(self, made: DispatchPlan, out: DispatchPlan) -> None:
        super().write(made, out)
        if self.problem.layout == "blocks":
            out.order[out.order == made.inverse.numel()] = -1


@caught_by("experts_begin_at_multiples_of_the_block", saying=r"^block_experts: .* got \d+$")
class BlocksPastTheEndAreTheLast(Reference):
    """Gives the blocks past the end to the last expert."""

    def write(self, made: DispatchPlan, out: DispatchPlan) -> None:
        super().write(made, out)
        if out.block_experts is not None:
            out.block_experts[out.block_experts == -1] = self.problem.num_experts - 1


def _with(problem: PlanProblem, **changes: Any) -> PlanProblem:
    return replace(problem, **changes)


def _dropping(made: DispatchPlan) -> bool:
    return made.num_dropped is not None and bool(made.num_dropped)


@caught_by("the_last_pairs_of_an_expert_are_dropped", saying=r"^(order|inverse): \d+ of")
class DropsTheFirst(Reference):
    """Keeps the last pairs of an expert."""

    def plan(self, ids: Tensor, capacity: int | None, weights: Tensor | None) -> DispatchPlan:
        made = super().plan(ids, capacity, weights)
        if self.problem.drop == "last" and self.problem.layout == "sorted" and _dropping(made):
            rising = torch.arange(ids.numel(), dtype=torch.float32).view(ids.shape)
            least = _with(self.problem, drop="least_weight")
            made = plan(least, ids, capacity, rising)
        return made


@caught_by("the_last_pairs_of_an_expert_are_dropped", saying=r"^(order|num_dropped): \d+ of")
class RanksIn8Bits(Reference):
    """Counts an expert's pairs in a byte: the 257th is a first one again."""

    def plan(self, ids: Tensor, capacity: int | None, weights: Tensor | None) -> DispatchPlan:
        made = super().plan(ids, capacity, weights)
        rows = self.problem.layout == "masked"
        if self.problem.drop == "last" and capacity == 1 and not rows and _dropping(made):
            every = plan(_with(self.problem, layout="sorted", block=1, drop="nothing"), ids)
            if int(every.counts.max()) > 256:
                made = made._replace(num_dropped=made.num_dropped - 1)
        return made


@caught_by("the_last_pairs_of_an_expert_are_dropped", saying=r"^num_dropped: ")
class DropsPadding(Reference):
    """Counts pairs of no expert among those that are dropped."""

    def plan(self, ids: Tensor, capacity: int | None, weights: Tensor | None) -> DispatchPlan:
        made = super().plan(ids, capacity, weights)
        if self.problem.drop == "last" and self.problem.layout != "masked":
            missing = ids.numel() - made.counts.sum(dtype=torch.int32)
            made = made._replace(num_dropped=missing.view(1))
        return made


class _Weighs(Reference):
    """Changes what the weights count."""

    def plan(self, ids: Tensor, capacity: int | None, weights: Tensor | None) -> DispatchPlan:
        if self.problem.drop == "least_weight":
            weights = self.weigh(weights)
        return super().plan(ids, capacity, weights)

    def weigh(self, weights: Tensor) -> Tensor:
        return weights


@caught_by("the_pairs_of_least_weight_are_dropped", saying=r"^(order|inverse): \d+ of")
class NanIsLargest(_Weighs):
    """Keeps NaN before everything, as a sort of PyTorch does."""

    def weigh(self, weights: Tensor) -> Tensor:
        return torch.where(weights.isnan(), torch.inf, weights)


@caught_by("the_pairs_of_least_weight_are_dropped", saying=r"^(order|inverse): \d+ of")
class NanIsZero(_Weighs):
    """Counts NaN as 0."""

    def weigh(self, weights: Tensor) -> Tensor:
        return weights.nan_to_num(0.0, torch.inf, -torch.inf)


@caught_by("the_pairs_of_least_weight_are_dropped", saying=r"^(order|inverse): \d+ of")
class MinusZeroIsLess(_Weighs):
    """Compares bits, in which -0 is below 0."""

    def weigh(self, weights: Tensor) -> Tensor:
        return torch.where((weights == 0) & weights.signbit(), -1e-45, weights)


@caught_by("the_pairs_of_least_weight_are_dropped", saying=r"^(order|inverse): \d+ of")
class TinyIsZero(_Weighs):
    """Counts subnormal weights as 0."""

    def weigh(self, weights: Tensor) -> Tensor:
        return torch.where(weights.abs() < 2.0**-126, 0.0, weights)


@caught_by("the_pairs_of_least_weight_are_dropped", saying=r"^(order|inverse): \d+ of")
class WeightsInHalfPrecision(_Weighs):
    """Compares weights in bfloat16."""

    def weigh(self, weights: Tensor) -> Tensor:
        return weights.bfloat16().float() if weights.gt(0.5).all() else weights


@caught_by("the_pairs_of_least_weight_are_dropped", saying=r"^(order|inverse): \d+ of")
class InfinityIsTheLargestFinite(_Weighs):
    """Clamps weights to the finite range: infinity ties with what is far below it."""

    def weigh(self, weights: Tensor) -> Tensor:
        return weights.clamp(-1e38, 1e38)


@caught_by("the_pairs_of_least_weight_are_dropped", saying=r"^(order|inverse): \d+ of")
class OfEqualWeightsTheFirstIsDropped(Reference):
    """Keeps the last of equal weights."""

    def plan(self, ids: Tensor, capacity: int | None, weights: Tensor | None) -> DispatchPlan:
        equal = self.problem.drop == "least_weight" and len(weights.unique()) < weights.numel() / 2
        if equal and self.problem.layout == "sorted" and not weights.isnan().any():
            steps = torch.arange(weights.numel()).view(weights.shape)
            ranks = torch.searchsorted(weights.unique(), weights.contiguous())
            weights = (ranks * weights.numel() + steps).float()
        return super().plan(ids, capacity, weights)


@caught_by("the_pairs_of_least_weight_are_dropped", saying=r"^order: \d+ of")
class KeptPairsByWeight(Reference):
    """Leaves the kept pairs of an expert by descending weight."""

    def plan(self, ids: Tensor, capacity: int | None, weights: Tensor | None) -> DispatchPlan:
        made = super().plan(ids, capacity, weights)
        if self.problem.drop == "least_weight" and self.problem.layout == "sorted":
            order = made.order.clone()
            ends = made.offsets.tolist()
            for begin, end in pairwise(ends):
                mine = made.order[begin:end].long()
                by_weight = weights.reshape(-1)[mine].sort(descending=True, stable=True).indices
                order[begin:end] = mine[by_weight].int()
            made = made._replace(order=order)
        return made


@caught_by("each_expert_has_a_row_of_its_own", saying=r"^counts: \d+ of \d+ are wrong, .* got 0$")
class CountsInBytes(Reference):
    """Counts the pairs of a row in a byte."""

    def plan(self, ids: Tensor, capacity: int | None, weights: Tensor | None) -> DispatchPlan:
        made = super().plan(ids, capacity, weights)
        if self.problem.layout == "masked" and len(ids) < 1000:
            made = made._replace(counts=made.counts // 256 * 0 + made.counts * (made.counts < 256))
        return made


@caught_by("each_expert_has_a_row_of_its_own", saying=r"^inverse: \d+ of")
class PlacesInARow(Reference):
    """Counts a pair's place from the beginning of its row."""

    def plan(self, ids: Tensor, capacity: int | None, weights: Tensor | None) -> DispatchPlan:
        made = super().plan(ids, capacity, weights)
        if self.problem.layout == "masked":
            within = torch.where(made.inverse < 0, -1, made.inverse % capacity)
            made = made._replace(inverse=within)
        return made


@caught_by("each_expert_has_a_row_of_its_own", saying=r"^offsets: \d+ of")
class OffsetsOfWhatIsUsed(Reference):
    """Adds up the counts, as in the other layouts."""

    def plan(self, ids: Tensor, capacity: int | None, weights: Tensor | None) -> DispatchPlan:
        made = super().plan(ids, capacity, weights)
        if self.problem.layout == "masked":
            sums = torch.nn.functional.pad(made.counts.cumsum(0), (1, 0))
            made = made._replace(offsets=sums)
        return made
