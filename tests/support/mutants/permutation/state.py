"""Clauses 7 and 10: what a kernel keeps between calls, and what depends on the batch."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from mutants.permutation._mutant import Combines, Permutes, caught_by
from mutants.permutation.moved import MultipliesByTheReciprocal
from mutants.permutation.sums import LastSlotFirst

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.planning import DispatchPlan


@caught_by("a_row_has_the_same_bits_in_any_batch", saying=r"^rows of tokens .* have other bits")
class ReciprocalsForManyTokens(MultipliesByTheReciprocal):
    """Multiplies by reciprocals where there are many tokens."""

    def quantize(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        few = len(rows) < 64
        return Permutes.quantize(self, rows) if few else super().quantize(rows)


@caught_by("a_row_has_the_same_bits_in_any_batch", saying=r"^out of tokens .* have other bits")
class AnotherOrderForManyTokens(LastSlotFirst):
    """Adds in another order where there are many tokens."""

    def add(self, rows: Tensor, plan: DispatchPlan, weights: Tensor | None) -> Tensor:
        few = len(plan.inverse) < 64
        add = Combines.add if few else LastSlotFirst.add
        return add(self, rows, plan, weights)


class _TicketsThatRunOut:
    """After 30 calls, writes the last row anew, from the first."""

    calls = 0

    def write(self, made: Tensor, out: Tensor) -> None:
        super().write(made, out)  # type: ignore[misc] # of the class that it is mixed into
        self.calls += 1
        if self.calls > 30:
            out[-1] = out[0]
            out[0] = out[-2]


@caught_by("the_same_call_gives_the_same_bits", saying=r"^run \d+ of 50: (rows|scales): other bits")
class PermutesUntilTicketsRunOut(_TicketsThatRunOut, Permutes):
    """Permutes so."""


@caught_by("the_same_call_gives_the_same_bits", saying=r"^run \d+ of 50: out: other bits$")
class CombinesUntilTicketsRunOut(_TicketsThatRunOut, Combines):
    """Combines so."""


class _Kept:
    """Keeps a copy of the rows of a call, and takes it for the rows at the same address again."""

    seen: Any = None
    kept: Tensor

    def read(self, rows: Tensor) -> Tensor:
        key = rows.data_ptr(), rows.shape
        if key != self.seen:
            self.seen, self.kept = key, rows.clone()
        return self.kept


CHANGED = r"^operands changed in place: (rows|scales|out): \d+ of"
STREAMS = r"^(rows|scales|out): \d+ of"


@caught_by("operands_changed_in_place_are_read_again", saying=CHANGED)
@caught_by("each_call_uses_its_own_operands_in_stream_order", saying=STREAMS)
class PermutesWhatItKept(_Kept, Permutes):
    """Permutes so."""


@caught_by("operands_changed_in_place_are_read_again", saying=CHANGED)
@caught_by("each_call_uses_its_own_operands_in_stream_order", saying=STREAMS)
class CombinesWhatItKept(_Kept, Combines):
    """Combines so."""


class _OneScratch:
    """Works in a buffer of its own, which all threads share."""

    scratch: Tensor | None = None

    def read(self, rows: Tensor) -> Tensor:
        if self.scratch is None or self.scratch.shape != rows.shape:
            self.scratch = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
        scratch = self.scratch.copy_(rows)
        time.sleep(0)  # lets another thread in
        return scratch


THREADS = r"^thread \d of 8: (rows|scales|out): (\d+ of|other bits)"


@caught_by("eight_threads_may_share_a_kernel", saying=THREADS)
class PermutesInOneScratch(_OneScratch, Permutes):
    """Permutes so."""


@caught_by("eight_threads_may_share_a_kernel", saying=THREADS)
class CombinesInOneScratch(_OneScratch, Combines):
    """Combines so."""
