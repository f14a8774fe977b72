"""Clauses 1, 2 and 3 of ``permute``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mutants.permutation._mutant import Permutes, caught_by

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.planning import DispatchPlan

WRONG = r"^rows: \d+ of \d+ are wrong, the first at \[\d+, \d+\]: expected .*, got "


@caught_by("rows_of_every_dtype_are_moved_bit_for_bit", saying=WRONG)
class ThroughFloatRegisters(Permutes):
    """Loses the payloads of NaN, as a conversion to float32 and back does."""

    def read(self, rows: Tensor) -> Tensor:
        if rows.dtype not in {torch.bfloat16, torch.float16, torch.float32}:
            return rows
        return torch.where(rows.isnan(), torch.nan, rows)


@caught_by("rows_of_every_dtype_are_moved_bit_for_bit", saying=WRONG)
class EightBytesOfAnElement(Permutes):
    """Moves the first 8 bytes of each element."""

    def move(self, rows: Tensor, plan: DispatchPlan) -> Tensor:
        moved = super().move(rows, plan)
        return moved.real + 0j if rows.dtype == torch.complex128 else moved


@caught_by("rows_of_every_size_are_moved", saying=WRONG)
class WholeVectorsOnly(Permutes):
    """Leaves out the columns past the last vector of 8 of wide rows."""

    def move(self, rows: Tensor, plan: DispatchPlan) -> Tensor:
        moved = super().move(rows, plan)
        if rows.shape[1] > 1000:
            moved[:, rows.shape[1] // 8 * 8 :] = 0
        return moved


@caught_by("tokens_past_65_535_are_permuted", saying=WRONG)
class TokensIn16Bits(Permutes):
    """Counts tokens in 16 bits."""

    def read(self, rows: Tensor) -> Tensor:
        return rows[torch.arange(len(rows)) % 65536] if len(rows) > 65536 else rows


LISTED = {
    1, 2, 3, 5, 7, 8, 9, 16, 31, 33, 37, 40, 64, 127, 128, 129, 130, 131, 200, 255, 256, 300, 520,
    1000, 2048, 2816, 7168, 8193,
}  # fmt: skip
"""Numbers of columns in the kit's lists."""


@caught_by("drawn_calls_are_permuted", saying=r"^(rows|scales): \d+ of")
class NoneButTheKitsSizes(Permutes):
    """Knows the numbers of columns that the kit lists, and no other."""

    def quantize(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return super().quantize(self.read(rows))

    def read(self, rows: Tensor) -> Tensor:
        return rows if rows.shape[1] in LISTED else torch.zeros_like(rows)


@caught_by("more_than_2_31_elements_are_moved", saying="^rows: the one at place", only_on="memory")
class OffsetsIn32Bits(Permutes):
    """Computes addresses in 32 bits."""

    def write(self, made: Tensor, out: Tensor) -> None:
        out[: 2**31 // out.shape[1]] = made[: 2**31 // out.shape[1]]


@caught_by("empty_places_are_zero", saying=WRONG + "nan$")
class MultipliesByZero(Permutes):
    """Multiplies the rows at empty places by 0."""

    def move(self, rows: Tensor, plan: DispatchPlan) -> Tensor:
        moved = super().move(rows, plan)
        if rows.dtype == torch.bfloat16 and len(rows):
            pairs, place = plan.inverse.numel(), torch.arange(plan.order.numel())
            empty = (plan.order.reshape(-1) >= pairs) | (place >= plan.offsets[-1])
            moved[empty] = rows[0] * 0
        return moved


@caught_by("empty_places_are_zero", saying=r"^(rows|scales): \d+ of .*: expected 0")
class LeavesThePlacesPastTheLastExpert(Permutes):
    """Writes zeros only up to the end of the last expert."""

    def write(self, made: Tensor, out: Tensor) -> None:
        self.last = out
        super().write(made, out)

    def move(self, rows: Tensor, plan: DispatchPlan) -> Tensor:
        moved = super().move(rows, plan)
        integers = moved.view(torch.uint8)
        integers[int(plan.offsets[-1]) :] = 1
        return moved


@caught_by("quantized_rows_have_the_bits_of_float32", saying=r"^rows: \d+ of \d+ are wrong")
class MultipliesByTheReciprocal(Permutes):
    """Multiplies by the reciprocal of a scale."""

    def quantize(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        _, scales = super().quantize(rows)
        each = scales.repeat_interleave(128, 1)[:, : rows.shape[1]]
        return (rows.float() * (1 / each)).clamp(-448, 448).to(torch.float8_e4m3fn), scales


@caught_by("quantized_rows_have_the_bits_of_float32", saying=r"^scales: \d+ of \d+ are wrong")
class ScalesOfZeroRowsAreOne(Permutes):
    """Gives groups of zeros the scale 1."""

    def quantize(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        values, scales = super().quantize(rows)
        return values, torch.where(scales < 3e-13, 1.0, scales)


@caught_by("quantized_rows_have_the_bits_of_float32", saying=r"^(rows|scales): \d+ of")
class OneScaleForShortRests(Permutes):
    """Lets the last group of a row, where it is short, share the scale of the one before."""

    def quantize(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        values, scales = super().quantize(rows)
        if rows.shape[1] > 128 and rows.shape[1] % 128:
            scales[:, -1] = scales[:, -2]
        return values, scales


@caught_by("nan_and_infinity_stay_in_their_group", saying=r"^(rows|scales): \d+ of .* expected nan")
class LargestThatIsANumber(Permutes):
    """Leaves NaN out when it looks for the largest magnitude."""

    def quantize(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        values, scales = super().quantize(rows.nan_to_num(0.0, torch.inf, -torch.inf))
        nan = torch.full_like(rows, torch.nan).to(values.dtype)
        return torch.where(rows.isnan(), nan.float(), values.float()).to(values.dtype), scales


@caught_by("nan_and_infinity_stay_in_their_group", saying=r"^rows: \d+ of .* expected nan, got")
class InfinityIsTheLargest(Permutes):
    """Takes infinity for the largest number."""

    def quantize(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        largest = torch.finfo(rows.dtype).max
        return super().quantize(rows.clamp(-largest, largest))
