"""Sizes that the author's lists do not have."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moe_routing.conformance.pairwise import TOPK
from moe_routing.kernel import RoutingOutput
from moe_routing.reference import oracle
from mutants._mutant import Reference, caught_by

if TYPE_CHECKING:
    from torch import Tensor


@caught_by(
    "rows_past_65_535_are_routed",
    "topk_softmax",
    saying=r"row 65536: ids \[-1, -1\] are not all in \[0, 16\)",
)
class Rows16Bits(Reference):
    """Launches a block for each row in the second dimension of a grid, which ends at 65,535."""

    def write(self, out: RoutingOutput, weights: Tensor, ids: Tensor) -> None:
        rows = torch.arange(len(ids), device=ids.device)[:, None]
        super().write(out, weights, ids.where(rows < 2**16, -1))


@caught_by("rows_past_65_535_are_routed", "topk_softmax", saying=r"row 65536: id \d+ at position")
class RowCounterWraps(Reference):
    """Counts rows in 16 bits."""

    def read(self, logits: Tensor) -> Tensor:
        return (
            logits
            if len(logits) <= 2**16
            else logits[torch.arange(len(logits), device=logits.device) % 2**16]
        )


@caught_by(
    "rows_past_65_535_are_routed", "topk_softmax", saying=r"row 6\d+: ids \[-7, -7\] are not all in"
)
class LastBlockOfManySkipped(Reference):
    """Rounds the number of its largest blocks, which serve many rows only, down."""

    def write(self, out: RoutingOutput, weights: Tensor, ids: Tensor) -> None:
        out.ids.fill_(-7)
        rows = len(ids) if len(ids) < 2**16 else len(ids) // 4096 * 4096
        super().write(RoutingOutput(out.weights[:rows], out.ids[:rows]), weights[:rows], ids[:rows])


@caught_by(
    "sizes_between_the_usual_are_routed", "topk_softmax", saying=r"row 4: id \d+ at position"
)
class FiveRowsAreFour(Reference):
    """Has a variant for four to six rows, which reads four or six."""

    def read(self, logits: Tensor) -> Tensor:
        return torch.cat([logits[:4], logits[:1]]) if len(logits) == 5 else logits


@caught_by(
    "sizes_between_the_usual_are_routed", "topk_softmax", saying=r"stands before id \d+ \(score"
)
class TopkOfTheList(Reference):
    """Is compiled for some K, takes the next one below, and leaves a gap before it goes on."""

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        if (
            self.topk in TOPK
            or self.topk == logits.shape[1]
            or self.spec.selection != "logits"
            or self.spec.num_groups > 1
        ):
            return super().select(logits, **operands)
        known = max(k for k in TOPK if k <= self.topk)
        ids = oracle.select(self.spec, logits, self.topk + 1, **operands)
        return torch.cat([ids[:, :known], ids[:, known + 1 :]], dim=-1)


@caught_by(
    "sizes_between_the_usual_are_routed", "topk_softmax", saying=r"stands before id \d+ \(score"
)
class ExpertsPast1024(Reference):
    """Looks at 1,024 experts of a row."""

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        if self.spec.selection != "token_table":
            behind = torch.arange(logits.shape[1], device=logits.device) >= 1024
            logits = logits.masked_fill(behind, -torch.inf)
        return super().select(logits, **operands)


@caught_by(
    "sizes_between_the_usual_are_routed",
    "topk_softmax",
    "sigmoid_topk",
    saying=r"stands before id \d+ \(score",
)
class WholeVectorsOnly(Reference):
    """Reads four experts at a time, and leaves out the last one to three."""

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        if (
            self.spec.selection == "token_table"
            or logits.shape[1] < 4
            or self.topk > logits.shape[1] - 4
        ):
            return super().select(logits, **operands)
        left_over = torch.arange(logits.shape[1], device=logits.device) >= logits.shape[1] // 4 * 4
        return super().select(logits.masked_fill(left_over, -torch.inf), **operands)


@caught_by(
    "drawn_sizes_are_routed",
    "topk_softmax",
    "gemma4",
    "softmax_topk",
    "sigmoid_topk",
    saying=r"^row 0: id \d+ at position",
)
class NoneButTheKitsSizes(Reference):
    """Is right for the numbers of experts that the kit's lists have, and for no others."""

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        known = (
            logits.shape[1] <= 64
            or logits.shape[1] % 8 == 0
            or logits.shape[1] in (1031, 1999, 70_001)
        )
        ids = super().select(logits, **operands)
        return ids if known else ids.flip(1) if self.topk > 1 else (ids + 1) % logits.shape[1]
