"""Clauses 1, 2 and 3 of ``combine``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mutants.permutation._mutant import Combines, caught_by
from mutants.permutation.moved import LISTED

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.planning import DispatchPlan

WRONG = r"^out: \d+ of \d+ are wrong, the first at \[\d+, \d+\]: expected .*, got "


@caught_by("sums_of_every_size_are_right", saying=WRONG)
class WholeVectorsOnly(Combines):
    """Leaves out the columns past the last vector of 8 of wide rows."""

    def write(self, made: Tensor, out: Tensor) -> None:
        super().write(made, out)
        if made.shape[1] > 1000:
            out[:, made.shape[1] // 8 * 8 :] = 0


@caught_by("sums_of_every_size_are_right", saying=WRONG)
class UpTo32Slots(Combines):
    """Adds the first 32 slots."""

    def add(self, rows: Tensor, plan: DispatchPlan, weights: Tensor | None) -> Tensor:
        kept = plan._replace(inverse=plan.inverse.clone())
        kept.inverse[:, 32:] = -1
        return super().add(rows, kept, weights)


@caught_by("rows_and_weights_of_every_dtype_are_summed", saying=WRONG)
class WeightsInBfloat16(Combines):
    """Rounds weights to bfloat16."""

    def add(self, rows: Tensor, plan: DispatchPlan, weights: Tensor | None) -> Tensor:
        return super().add(rows, plan, None if weights is None else weights.bfloat16())


@caught_by("rows_and_weights_of_every_dtype_are_summed", saying=WRONG)
class AbsoluteWeights(Combines):
    """Takes weights for positive."""

    def add(self, rows: Tensor, plan: DispatchPlan, weights: Tensor | None) -> Tensor:
        return super().add(rows, plan, None if weights is None else weights.abs())


@caught_by("sums_follow_the_order_of_the_slots", saying=WRONG)
class LastSlotFirst(Combines):
    """Adds from slot K - 1 to slot 0."""

    def add(self, rows: Tensor, plan: DispatchPlan, weights: Tensor | None) -> Tensor:
        turned = plan._replace(inverse=plan.inverse.flip(1))
        return super().add(rows, turned, None if weights is None else weights.flip(1))


@caught_by("sums_follow_the_order_of_the_slots", saying=WRONG)
class InTheOrderOfTheExperts(Combines):
    """Adds the rows of a token as they lie."""

    def add(self, rows: Tensor, plan: DispatchPlan, weights: Tensor | None) -> Tensor:
        places, order = plan.inverse.sort(dim=1)
        by_place = None if weights is None else weights.gather(1, order)
        return super().add(rows, plan._replace(inverse=places), by_place)


@caught_by("sums_follow_the_order_of_the_slots", saying=WRONG)
class SumsInTheRowsDtype(Combines):
    """Rounds each partial sum to the rows' dtype."""

    def add(self, rows: Tensor, plan: DispatchPlan, weights: Tensor | None) -> Tensor:
        total = torch.zeros(len(plan.inverse), rows.shape[1], dtype=rows.dtype)
        for k in range(self.problem.topk):
            one = plan._replace(inverse=torch.full_like(plan.inverse, -1))
            one.inverse[:, k] = plan.inverse[:, k]
            total += super().add(rows, one, weights)
        return total


@caught_by("tokens_past_65_535_are_combined", saying=WRONG)
class TokensIn16Bits(Combines):
    """Leaves out tokens that a 16-bit number does not count."""

    def write(self, made: Tensor, out: Tensor) -> None:
        super().write(made, out)
        out[65536:] = 0


@caught_by("drawn_calls_are_combined", saying=WRONG)
class NoneButTheKitsSizes(Combines):
    """Knows the numbers of columns that the kit lists, and no other."""

    def read(self, rows: Tensor) -> Tensor:
        return rows if rows.shape[1] in LISTED else torch.ones_like(rows)


@caught_by("rows_past_2_31_elements_are_read", saying="^out: sums of last rows", only_on="memory")
class OffsetsIn32Bits(Combines):
    """Computes addresses in 32 bits."""

    def read(self, rows: Tensor) -> Tensor:
        place = torch.arange(len(rows), device=rows.device)
        return rows[place % (2**31 // rows.shape[1])]


@caught_by("pairs_without_a_place_add_nothing", saying=r"^with weights of nan there: out: \d+ of")
class WeightsTimesZero(Combines):
    """Adds a row of zeros for a pair without a place, times its weight."""

    def add(self, rows: Tensor, plan: DispatchPlan, weights: Tensor | None) -> Tensor:
        made = super().add(rows, plan, weights)
        if weights is None:
            return made
        without = (plan.inverse < 0) | (plan.inverse >= plan.offsets[-1])
        return made + (torch.where(without, weights, 0.0) * 0.0).sum(1, keepdim=True).to(made.dtype)


@caught_by("pairs_without_a_place_add_nothing", saying=WRONG)
class StraysOfTheSortedLayoutCount(Combines):
    """Takes every place that is in memory for one of an expert."""

    def add(self, rows: Tensor, plan: DispatchPlan, weights: Tensor | None) -> Tensor:
        offsets = plan.offsets.clone()
        offsets[-1] = plan.order.numel()
        return super().add(rows, plan._replace(offsets=offsets), weights)


@caught_by("rows_without_a_pair_are_not_read", saying=r"^rows of nan there: out: \d+ of")
class MasksByZero(Combines):
    """Reads row 0 for a pair without a place, and multiplies it by 0."""

    def add(self, rows: Tensor, plan: DispatchPlan, weights: Tensor | None) -> Tensor:
        made = super().add(rows, plan, weights)
        without = (plan.inverse < 0) | (plan.inverse >= plan.offsets[-1])
        return made + without.any(1, keepdim=True) * (rows[-1] * 0)


@caught_by("rows_of_a_masked_plan_may_be_one_matrix", saying=WRONG)
class MatricesAreContiguous(Combines):
    """Reads the rows of a plan of 9 places an expert one after another."""

    def add(self, rows: Tensor, plan: DispatchPlan, weights: Tensor | None) -> Tensor:
        if plan.order.dim() > 1 and plan.order.shape[1] in {3, 9}:
            rows = rows.roll(1, 0)
        return super().add(rows, plan, weights)


@caught_by("nan_and_infinity_that_are_read_come_out", saying=WRONG + r"(?!nan)")
class SkipsWeightsOfZero(Combines):
    """Does not add a row whose weight is 0."""

    def add(self, rows: Tensor, plan: DispatchPlan, weights: Tensor | None) -> Tensor:
        if weights is not None:
            plan = plan._replace(inverse=torch.where(weights == 0, -1, plan.inverse))
        return super().add(rows, plan, weights)


@caught_by("nan_and_infinity_that_are_read_come_out", saying=WRONG)
class NanIsZero(Combines):
    """Takes NaN in rows for 0."""

    def read(self, rows: Tensor) -> Tensor:
        return rows.nan_to_num(0.0, torch.inf, -torch.inf)


@caught_by("sums_past_the_largest_number_are_infinite", saying=r"^out: .*: expected -?inf, got ")
class Saturates(Combines):
    """Writes the largest number where a sum exceeds it."""

    def add(self, rows: Tensor, plan: DispatchPlan, weights: Tensor | None) -> Tensor:
        made = super().add(rows, plan, weights)
        largest = torch.finfo(rows.dtype).max
        return made.nan_to_num(torch.nan, largest, -largest)
