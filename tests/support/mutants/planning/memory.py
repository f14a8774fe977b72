"""Clause 6: strides, and what is written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mutants.planning._mutant import Reference, caught_by

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.planning import DispatchPlan


@caught_by("ids_of_any_strides_are_read_as_they_lie", saying=r"^(order|counts): \d+ of")
class AsIfContiguous(Reference):
    """Reads the ids one after another, whatever their strides."""

    def read(self, ids: Tensor) -> Tensor:
        tokens, topk = ids.shape
        end = ids.storage_offset() + ids.numel()
        enough = ids.untyped_storage().nbytes() // ids.element_size() >= end
        return ids.as_strided((tokens, topk), (topk, 1)) if enough else ids


@caught_by("ids_of_any_strides_are_read_as_they_lie", saying=r"^(order|inverse): \d+ of")
class WeightsAsIfContiguous(Reference):
    """Reads the weights one after another, whatever their strides."""

    def plan(self, ids: Tensor, capacity: int | None, weights: Tensor | None) -> DispatchPlan:
        if weights is not None and weights.untyped_storage().nbytes() >= 4 * weights.numel():
            weights = weights.as_strided(weights.shape, (weights.shape[1], 1), 0)
        return super().plan(ids, capacity, weights)


@caught_by("ids_of_any_strides_are_read_as_they_lie", saying=r"^ids: were changed$")
class CleansTheIds(Reference):
    """Writes -1 over ids of no expert, where the ids lie."""

    def read(self, ids: Tensor) -> Tensor:
        if 0 not in ids.stride():
            ids[(ids < 0) | (ids >= self.problem.num_experts)] = -1
        return ids


@caught_by(
    "given_outputs_are_filled_and_nothing_else",
    saying=r"^order: elements before or after it are changed$",
)
class PairsOfPlaces(Reference):
    """Writes two places at a time, also where their number is odd."""

    def write(self, made: DispatchPlan, out: DispatchPlan) -> None:
        super().write(made, out)
        after = out.order.storage_offset() + out.order.numel()
        room = out.order.untyped_storage().nbytes() // 4 > after
        if made.inverse.numel() % 2 and room:
            out.order.as_strided((1,), (1,), after).zero_()


@caught_by("given_outputs_are_filled_and_nothing_else", saying=r"^out: counts: .* got -7$")
class CountsOfTheUsed(Reference):
    """Writes no count for experts that have no pair."""

    def write(self, made: DispatchPlan, out: DispatchPlan) -> None:
        before = out.counts.clone()
        super().write(made, out)
        unused = made.counts == 0
        out.counts[unused] = before[unused]
