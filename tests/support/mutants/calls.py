"""Clauses 8 to 13: memory, batches, streams and padding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moe_routing.kernel import RoutingOutput
from moe_routing.reference import oracle
from mutants._mutant import Reference, caught_by

if TYPE_CHECKING:
    from torch import Tensor


@caught_by(
    "any_strides_are_read_as_they_lie", "topk_softmax", saying=r"stands before id \d+ \(score"
)
class TransposedStridesIgnored(Reference):
    """Reads the memory as if it were contiguous."""

    def read(self, logits: Tensor) -> Tensor:
        last = sum((n - 1) * s for n, s in zip(logits.shape, logits.stride(), strict=True))
        return (
            logits
            if last + 1 < logits.numel()
            else logits.as_strided(logits.shape, (logits.shape[1], 1))
        )


@caught_by("any_strides_are_read_as_they_lie", "topk_softmax", saying="row 0: id 1 at position 1")
class RowZeroForOneToken(Reference):
    """Reads row 0 of the storage if there is one token."""

    def read(self, logits: Tensor) -> Tensor:
        return logits.as_strided(logits.shape, logits.stride(), 0) if len(logits) == 1 else logits


@caught_by("offsets_past_2_31_are_read", "topk_softmax", saying="row 2: id 2 at position 2")
class Int32Offsets(Reference):
    """Computes row offsets in 32 bits, which wrap (here: to the row itself, less 2**31)."""

    def read(self, logits: Tensor) -> Tensor:
        offsets = [row * logits.stride(0) % 2**31 for row in range(len(logits))]
        return torch.stack(
            [
                logits.as_strided(
                    (logits.shape[1],), (logits.stride(1),), logits.storage_offset() + o
                )
                for o in offsets
            ]
        )


@caught_by(
    "row_strides_cost_no_copy", "topk_softmax", saying="contiguous logits of 65792 bytes allocate"
)
class CopiesSlicedLogits(Reference):
    """Calls contiguous() on whatever comes."""

    def read(self, logits: Tensor) -> Tensor:
        return logits.contiguous()


@caught_by(
    "a_rows_bits_do_not_depend_on_its_batch",
    "topk_softmax",
    saying="weights of a row in a batch of 1",
)
class RoundsByTheBatch(Reference):
    """Takes another path, with another rounding, for a few rows."""

    def weigh(
        self, logits: Tensor, ids: Tensor, bias: Tensor | None, scale: Tensor | None
    ) -> Tensor:
        weights = super().weigh(logits, ids, bias, scale)
        return weights if len(logits) > 16 else (weights.float() * 3 / 3).double() * (1 + 2**-23)


@caught_by("the_same_input_gives_the_same_bits", "topk_softmax", saying="run 1 differs from run 0")
class TiesAtRandom(Reference):
    """Lets the fastest thread win a tie."""

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        del operands
        order = torch.randperm(logits.shape[1], device=logits.device)
        return order[oracle.descending(oracle.clean(logits)[:, order])[:, : self.topk]]


@caught_by(
    "outputs_are_contiguous",
    "topk_softmax",
    saying="ids: expected a contiguous tensor, got strides",
)
class IdsAreAView(Reference):
    """Returns the first K of all E sorted ids, whose rows are E apart in memory."""

    def __call__(
        self, logits: Tensor, *, out: RoutingOutput | None = None, **operands: Any
    ) -> RoutingOutput:
        """Route, and widen the memory of the ids."""
        weights, ids = super().__call__(logits, out=out, **operands)
        wide = ids.new_zeros(len(ids), logits.shape[1] + 1)[:, : ids.shape[1]]
        return RoutingOutput(weights, ids if out is not None else wide.copy_(ids))


@caught_by(
    "each_call_uses_its_own_inputs_in_stream_order",
    "topk_softmax",
    saying=r"stands before id \d+ \(score",
)
class WrongStream(Reference):
    """Reads what the logits held before: as a kernel on another stream, which does not wait."""

    before: Tensor | None = None

    def read(self, logits: Tensor) -> Tensor:
        stale, self.before = self.before, logits.clone()
        return stale if stale is not None and stale.shape == logits.shape else logits


@caught_by(
    "each_call_uses_its_own_inputs_in_stream_order",
    "topk_softmax",
    saying=r"stands before id \d+ \(score",
)
class OneOutputForAllCalls(Reference):
    """Keeps its outputs, and hands the same memory out again."""

    kept: RoutingOutput | None = None

    def __call__(
        self, logits: Tensor, *, out: RoutingOutput | None = None, **operands: Any
    ) -> RoutingOutput:
        """Route into the memory of the call before."""
        if out is None and self.kept is not None and len(self.kept.ids) == len(logits):
            out = self.kept
        self.kept = super().__call__(logits, out=out, **operands)
        return self.kept


@caught_by("padding_is_blank", "topk_softmax", saying="padding: row 0 needs ids -1")
class PaddingIgnored(Reference):
    """Routes padding like any row."""

    def finish(
        self, weights: Tensor, ids: Tensor, num_experts: int, **operands: Any
    ) -> RoutingOutput:
        return super().finish(weights, ids, num_experts, **operands | {"num_valid_tokens": None})


@caught_by("padding_is_blank", "topk_softmax", saying="padding: row 0 needs weights 0")
class PaddingKeepsItsWeights(Reference):
    """Blanks ids and leaves weights."""

    def write(self, out: RoutingOutput, weights: Tensor, ids: Tensor) -> None:
        super().write(out, weights.masked_fill(ids < 0, 0.5), ids)


@caught_by(
    "tokens_without_experts_are_padding", "hash_sqrtsoftplus", saying="padding: row 0 needs ids -1"
)
class TokenIdsWrapAround(Reference):
    """Looks up token id -1 from the end of the table.

    For other ids that the table lacks, it takes the nearest token of the table.
    """

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        table, tokens = operands["expert_table"], operands["token_ids"]
        assert table is not None
        assert tokens is not None
        tokens = torch.where(
            (tokens < 0) & (tokens >= -len(table)), tokens + len(table), tokens
        ).clamp(0, len(table) - 1)
        return oracle.select(self.spec, logits, self.topk, **operands | {"token_ids": tokens})


@caught_by(
    "tokens_without_experts_are_padding", "hash_sqrtsoftplus", saying="padding: row 15 needs ids -1"
)
class EntriesCutTo32Bits(Reference):
    """Compares an entry of the table with E after it was narrowed to int32."""

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        table = operands["expert_table"]
        assert table is not None
        return oracle.select(
            self.spec, logits, self.topk, **operands | {"expert_table": table.to(torch.int32)}
        )


@caught_by(
    "tokens_without_experts_are_padding", "hash_sqrtsoftplus", saying="padding: row 0 needs ids -1"
)
class StrayEntriesOnlyLoseTheirWeight(Reference):
    """Gives a stray entry of the table the weight 0, and routes the row to the others."""

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        table = operands["expert_table"]
        assert table is not None
        inside = table.clamp(0, logits.shape[1] - 1)
        return oracle.select(self.spec, logits, self.topk, **operands | {"expert_table": inside})


@caught_by(
    "a_mask_says_which_rows_are_padding", "topk_softmax", saying=r"padding: row \d+ needs ids -1"
)
class MaskIsItsSum(Reference):
    """Takes the number of valid tokens for that of a batch that is padded at its end."""

    def finish(
        self, weights: Tensor, ids: Tensor, num_experts: int, **operands: Any
    ) -> RoutingOutput:
        valid = operands["num_valid_tokens"]
        if isinstance(valid, torch.Tensor) and valid.dtype is torch.bool:
            operands["num_valid_tokens"] = int(valid.sum())
        return super().finish(weights, ids, num_experts, **operands)


@caught_by(
    "a_mask_says_which_rows_are_padding",
    "topk_softmax",
    saying=r"a mask, drawn: weights of its rows",
)
class WeightsOfFewerRows(Reference):
    """Weighs rows another way if some are padding."""

    def finish(
        self, weights: Tensor, ids: Tensor, num_experts: int, **operands: Any
    ) -> RoutingOutput:
        valid = operands["num_valid_tokens"]
        if isinstance(valid, torch.Tensor) and valid.dtype is torch.bool:
            weights = weights * (1 + 2.0**-22)
        return super().finish(weights, ids, num_experts, **operands)
