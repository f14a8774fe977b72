"""Clauses 4 and 5: strides, what is written, and plans of any content."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mutants.permutation._mutant import Combines, Permutes, caught_by, memory_before, overrun

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.planning import DispatchPlan


class _TwoColumnsAtATime:
    """Writes two columns at a time, also where their number is odd."""

    def write(self, made: Tensor, out: Tensor) -> None:
        super().write(made, out)  # type: ignore[misc] # of the class that it is mixed into
        if out.shape[1] % 2:
            overrun(out)


OVERRUN = "bytes before or after it are changed$"


@caught_by("every_output_is_written_and_nothing_else", saying=f"^(rows|scales): {OVERRUN}")
class PermutesTwoColumnsAtATime(_TwoColumnsAtATime, Permutes):
    """Permutes so."""


@caught_by("every_output_is_written_and_nothing_else", saying=f"^out: {OVERRUN}")
class CombinesTwoColumnsAtATime(_TwoColumnsAtATime, Combines):
    """Combines so."""


@caught_by(
    "every_output_is_written_and_nothing_else", saying=r"^out: \d+ of .*: expected 0.0, got \d"
)
class SkipsTokensWithoutAPlace(Combines):
    """Writes nothing for a token without any place."""

    def add(self, rows: Tensor, plan: DispatchPlan, weights: Tensor | None) -> Tensor:
        self.with_place = (plan.inverse >= 0) & (plan.inverse < plan.offsets[-1])
        return super().add(rows, plan, weights)

    def write(self, made: Tensor, out: Tensor) -> None:
        some = self.with_place.any(1)
        out[some] = made[some]


class _Packed:
    """Reads rows one after another, whatever their stride."""

    def read(self, rows: Tensor) -> Tensor:
        end = rows.storage_offset() + rows.numel()
        enough = rows.untyped_storage().nbytes() // rows.itemsize >= end
        return rows.as_strided(rows.shape, (rows.shape[1], 1)) if enough else rows


class _FromTheStart:
    """Reads rows from the beginning of their memory."""

    def read(self, rows: Tensor) -> Tensor:
        return rows.as_strided(rows.shape, rows.stride(), 0)


STRIDES = r"^(rows|scales|out): \d+ of"


@caught_by("rows_of_any_strides_are_read_as_they_lie", saying=STRIDES)
class PermutesAsIfContiguous(_Packed, Permutes):
    """Permutes so."""


@caught_by("rows_of_any_strides_are_read_as_they_lie", saying=STRIDES)
class CombinesAsIfContiguous(_Packed, Combines):
    """Combines so."""


@caught_by("a_kernel_reads_rows_at_any_stride", saying=STRIDES)
class PermutesFromTheStart(_FromTheStart, Permutes):
    """Permutes so."""


@caught_by("a_kernel_reads_rows_at_any_stride", saying=STRIDES)
class CombinesFromTheStart(_FromTheStart, Combines):
    """Combines so."""


class _AddsOne:
    """Adds 1 to the last element of the rows that it has read, where they lie."""

    def write(self, made: Tensor, out: Tensor) -> None:
        super().write(made, out)  # type: ignore[misc] # of the class that it is mixed into
        if self.rows.itemsize > 1:
            self.rows[-1, -1] += 1

    def read(self, rows: Tensor) -> Tensor:
        self.rows = rows
        return rows


@caught_by("rows_of_any_strides_are_read_as_they_lie", saying="^hidden: the call has changed it$")
@caught_by("the_operators_pass_opcheck", saying=r"^opcheck of permute raises \w+: .*mutat")
class PermutesAndChangesTheRows(_AddsOne, Permutes):
    """Permutes so."""


@caught_by("rows_of_any_strides_are_read_as_they_lie", saying="^rows: the call has changed it$")
@caught_by("the_operators_pass_opcheck", saying=r"^opcheck of combine raises \w+: .*mutat")
class CombinesAndChangesTheRows(_AddsOne, Combines):
    """Combines so."""


class _Scratch:
    """Works in a buffer that it makes in the first call, which inference mode may mark."""

    scratch: Tensor | None = None

    def read(self, rows: Tensor) -> Tensor:
        if self.scratch is None or self.scratch.shape != rows.shape:
            self.scratch = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
        return self.scratch.copy_(rows)


@caught_by("grad_modes_change_nothing", saying="raises RuntimeError: Inplace update")
class PermutesInAScratchOfInferenceMode(_Scratch, Permutes):
    """Permutes so."""


@caught_by("grad_modes_change_nothing", saying="raises RuntimeError: Inplace update")
class CombinesInAScratchOfInferenceMode(_Scratch, Combines):
    """Combines so."""


@caught_by("plans_of_any_content_touch_nothing_else", saying=r"^rows: \d+ elements are of no row")
class TrustsTheOrder(Permutes):
    """Reads the row before the first for a negative pair."""

    def move(self, rows: Tensor, plan: DispatchPlan) -> Tensor:
        moved = super().move(rows, plan)
        if rows.stride(1) == 1 and memory_before(rows, rows.stride(0)):
            before = rows.as_strided(
                (1, rows.shape[1]), rows.stride(), rows.storage_offset() - rows.stride(0)
            )
            moved[plan.order.reshape(-1) < 0] = before[0]
        return moved


@caught_by("plans_of_any_content_touch_nothing_else", saying=rf"^rows: {OVERRUN}")
class WritesToPlacesPastTheEnd(Permutes):
    """Scatters to places, of which it looks only whether they are below ``offsets[E]``."""

    def move(self, rows: Tensor, plan: DispatchPlan) -> Tensor:
        past = plan.inverse >= plan.order.numel()
        self.past = bool((past & (plan.inverse < plan.offsets[-1])).any())
        return super().move(rows, plan)

    def write(self, made: Tensor, out: Tensor) -> None:
        super().write(made, out)
        if self.past:
            overrun(out)


@caught_by("plans_of_any_content_touch_nothing_else", saying=r"^out: \d+ of .*, got nan$")
class TrustsTheInverse(Combines):
    """Reads the row after the last for the place past the end."""

    def add(self, rows: Tensor, plan: DispatchPlan, weights: Tensor | None) -> Tensor:
        made = super().add(rows, plan, weights)
        places = plan.order.numel()
        past = (plan.inverse == places) & (plan.offsets[-1] > places)
        return torch.where(past.any(1, keepdim=True), torch.nan, made)
