"""Operands of a dtype, value or form that the author did not think of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moe_routing.reference import oracle
from mutants._mutant import Reference, caught_by

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.kernel import RoutingOutput


class Changing(Reference):
    """Routes with an operand that a subclass changes."""

    def __call__(
        self, logits: Tensor, *, out: RoutingOutput | None = None, **operands: Any
    ) -> RoutingOutput:
        """Change the operands that there are, and route."""
        for name, value in operands.items():
            if value is not None and hasattr(self, name):
                operands[name] = getattr(self, name)(value)
        return super().__call__(logits, out=out, **operands)


@caught_by(
    "operands_of_every_dtype_are_read", "sigmoid_bias_topk", saying="^bias of torch.float16: row"
)
class HalfBiasReadAsBfloat16(Changing):
    """Knows one 16-bit dtype."""

    def bias(self, bias: Tensor) -> Tensor:
        return bias.view(torch.bfloat16) if bias.dtype == torch.float16 else bias


@caught_by(
    "operands_of_every_dtype_are_read",
    "gemma4",
    saying=r"^per_expert_scale of torch.float16: row 0: weight of id",
)
class HalfScaleReadAsBfloat16(Changing):
    """Knows one 16-bit dtype."""

    def per_expert_scale(self, scale: Tensor) -> Tensor:
        return scale.view(torch.bfloat16) if scale.dtype == torch.float16 else scale


@caught_by(
    "operands_of_every_dtype_are_read",
    "sigmoid_bias_topk",
    saying="^bias of torch.float8_e4m3fnuz: row \\d+: id",
)
class OneBiasOfEightBits(Changing):
    """Reads the 8-bit floats of one maker as those of another."""

    def bias(self, bias: Tensor) -> Tensor:
        return bias.view(torch.float8_e4m3fn) if bias.dtype == torch.float8_e4m3fnuz else bias


@caught_by(
    "operands_of_every_dtype_are_read",
    "gemma4",
    saying="^per_expert_scale of torch.float8_e8m0fnu: row 0: weight of id",
)
class ExponentsAreTheScales(Changing):
    """Takes the bits of a power of two for the number."""

    def per_expert_scale(self, scale: Tensor) -> Tensor:
        return scale.view(torch.uint8).float() if scale.dtype == torch.float8_e8m0fnu else scale


@caught_by(
    "float64_logits_are_rounded_first", "topk_softmax", saying="although their scores are equal"
)
class Float64Compared(Reference):
    """Selects in the precision in which the logits come."""

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        if (
            logits.dtype != torch.float64
            or self.spec.selection != "logits"
            or self.spec.num_groups > 1
        ):
            return super().select(logits, **operands)
        return oracle.descending(logits.nan_to_num(nan=-torch.inf))[:, : self.topk]


@caught_by(
    "operands_with_strides_are_read_as_they_lie",
    "gemma4",
    saying="^per_expert_scale with an offset",
)
class OperandsFromTheStart(Changing):
    """Passes the address of the storage on."""

    def per_expert_scale(self, scale: Tensor) -> Tensor:
        return scale.as_strided(scale.shape, scale.stride(), 0)


@caught_by(
    "logits_of_rare_dtypes_are_read",
    "topk_softmax",
    saying=r"row 0: weight of id \d+ is 0\.99\d+, exactly 0\.55",
)
class OneEightBitDtype(Reference):
    """Reads every 8-bit float as the one with the wider range."""

    def read(self, logits: Tensor) -> Tensor:
        return logits.view(torch.float8_e5m2) if logits.dtype == torch.float8_e4m3fn else logits


@caught_by(
    "scales_of_every_sign_are_used",
    "gemma4",
    saying=r"^scales of every sign: row 0: weight of id \d+ is .*, exactly -",
)
class AbsoluteScale(Changing):
    """Takes the scale for a norm."""

    def per_expert_scale(self, scale: Tensor) -> Tensor:
        return scale.abs()


@caught_by(
    "scales_of_every_sign_are_used",
    "gemma4",
    saying=r"^scales of every sign: row 0: weight of id \d+ is .*, exactly -?0:",
)
class ZeroScaleIsNoScale(Changing):
    """Takes a scale of 0 for one that is not set."""

    def per_expert_scale(self, scale: Tensor) -> Tensor:
        return scale.where(scale != 0, 1.0)


@caught_by(
    "scales_of_every_sign_are_used",
    "gemma4",
    saying=r"^scales of every sign: row 0: weight of id \d+ is -\d{5}\.\d+, exactly",
)
class ScaleInHalfPrecision(Changing):
    """Keeps the scale where 65,504 is the largest number."""

    def per_expert_scale(self, scale: Tensor) -> Tensor:
        return scale.clamp(-65504, 65504)


@caught_by(
    "biases_of_every_value_are_ranked_right",
    "sigmoid_bias_topk",
    saying=r"^biases of every value: row 0: id 1 at position 0",
)
class NanBiasFirst(Reference):
    """Sorts as torch does: NaN above everything."""

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        bias = operands["bias"]
        return super().select(
            logits,
            **operands | {"bias": None if bias is None else bias.nan_to_num(torch.inf, torch.inf)},
        )


@caught_by(
    "biases_of_every_value_are_ranked_right",
    "sqrtsoftplus_bias",
    saying=r"^biases of every value: row 0: id",
)
class BiasInHalfPrecision(Changing):
    """Keeps the bias where 65,504 is the largest number."""

    def bias(self, bias: Tensor) -> Tensor:
        return bias.clamp(-65504, 65504)


@caught_by(
    "biases_of_every_value_are_ranked_right",
    "sigmoid_bias_topk",
    saying=r"^biases of every value: row 0: id",
)
class BiasesThatAreNoNumbersAreZero(Changing):
    """Repairs a bias that is NaN or infinite."""

    def bias(self, bias: Tensor) -> Tensor:
        return bias.nan_to_num(0.0, 0.0, 0.0)


@caught_by(
    "masked_experts_come_last",
    "sigmoid_bias_topk",
    "logit_bias_sigmoid",
    saying=r"stands before id \d+ \(score",
)
class KeysOnOneGrid(Reference):
    """Sorts many rows by integers that spread over the range of the scores.

    A mask makes the range too wide for the other scores.
    """

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        if len(logits) < 4096 or not self.spec.needs_bias or self.spec.num_groups > 1:
            return super().select(logits, **operands)
        keys = oracle.selection_keys(self.spec, logits, bias=operands["bias"])
        low, high = keys.amin(-1, keepdim=True), keys.amax(-1, keepdim=True)
        return oracle.descending(((keys - low) / (high - low) * 2**40).round())[:, : self.topk]


@caught_by(
    "num_valid_tokens_may_have_any_form",
    "topk_softmax",
    saying=r"^num_valid_tokens torch.int32 of shape \[\] 0: padding: row 0",
)
class ScalarTensorIgnored(Reference):
    """Looks for a vector of one element."""

    def finish(
        self, weights: Tensor, ids: Tensor, num_experts: int, **operands: Any
    ) -> RoutingOutput:
        valid = operands["num_valid_tokens"]
        ignored = isinstance(valid, torch.Tensor) and valid.dim() == 0
        return super().finish(
            weights, ids, num_experts, **operands | {"num_valid_tokens": None if ignored else valid}
        )


@caught_by(
    "num_valid_tokens_may_have_any_form",
    "topk_softmax",
    saying=r"^num_valid_tokens torch.int64 of .* 2147483648: row 0: ids \[-1",
)
class ValidTokensCutTo32Bits(Reference):
    """Passes the number on in 32 bits."""

    def finish(
        self, weights: Tensor, ids: Tensor, num_experts: int, **operands: Any
    ) -> RoutingOutput:
        valid = operands["num_valid_tokens"]
        if valid is not None:
            operands["num_valid_tokens"] = (
                valid.to(torch.int32) if isinstance(valid, torch.Tensor) else valid % 2**32
            )
        return super().finish(weights, ids, num_experts, **operands)


@caught_by(
    "num_valid_tokens_may_have_any_form",
    "topk_softmax",
    saying=r"of shape \[\] -3: padding: row 0 needs ids -1",
)
class ValidTokensWithoutASign(Reference):
    """Compares row numbers with an unsigned number."""

    def finish(
        self, weights: Tensor, ids: Tensor, num_experts: int, **operands: Any
    ) -> RoutingOutput:
        valid = operands["num_valid_tokens"]
        if isinstance(valid, torch.Tensor):
            operands["num_valid_tokens"] = torch.where(
                valid < 0, torch.iinfo(valid.dtype).max, valid
            )
        return super().finish(weights, ids, num_experts, **operands)


@caught_by(
    "physical_ids_may_be_any_number",
    "topk_softmax",
    saying="^physical ids up to 4294967303, a map of torch.int64",
)
class MapReadIn32Bits(Changing):
    """Reads a map of int64 as int32."""

    def expert_map(self, physical: Tensor) -> Tensor:
        return physical.to(torch.int32)


@caught_by(
    "physical_ids_may_be_any_number",
    "topk_softmax",
    saying="^physical ids up to 2147483647, a map of torch.int32",
)
class MapThroughFloat32(Changing):
    """Looks physical ids up with a product of matrices."""

    def expert_map(self, physical: Tensor) -> Tensor:
        return physical.float().double().clamp(max=2**31 - 128).long()


ELSEWHERE = r"^every second expert is elsewhere, a map of torch.int32: row \d+: "


@caught_by(
    "experts_may_share_a_physical_id_or_be_elsewhere",
    "topk_softmax",
    saying=ELSEWHERE + r"weights \[.*; without expert_map \[",
)
class ElsewhereHasNoWeight(Reference):
    """Leaves an expert that is elsewhere to whoever has it, and its weight out."""

    def finish(
        self, weights: Tensor, ids: Tensor, num_experts: int, **operands: Any
    ) -> RoutingOutput:
        routed = super().finish(weights, ids, num_experts, **operands)
        return routed._replace(weights=routed.weights.masked_fill(routed.ids < 0, 0.0))


@caught_by(
    "experts_may_share_a_physical_id_or_be_elsewhere",
    "topk_softmax",
    saying=ELSEWHERE + r"ids \[-1, .*, renamed \[-1, .*\d",
)
class RowsThatBeginElsewhereArePadding(Reference):
    """Tells padding by the first physical id."""

    def finish(
        self, weights: Tensor, ids: Tensor, num_experts: int, **operands: Any
    ) -> RoutingOutput:
        routed = super().finish(weights, ids, num_experts, **operands)
        return routed._replace(ids=routed.ids.masked_fill(routed.ids[:, :1] < 0, -1))


@caught_by(
    "experts_may_share_a_physical_id_or_be_elsewhere",
    "topk_softmax",
    saying=ELSEWHERE + r"ids \[.*4294967295, .*, renamed \[",
)
class MapWithoutASign(Changing):
    """Widens a map of int32 as if its entries had no sign."""

    def expert_map(self, physical: Tensor) -> Tensor:
        return (
            physical.long() % 2**32
            if physical.dtype == torch.int32 and self.ids_dtype == torch.int64
            else physical
        )


@caught_by(
    "experts_may_share_a_physical_id_or_be_elsewhere",
    "topk_softmax",
    saying=r"^two experts share each id, a map of torch.int32: row \d+: ids \[.*-1.*, renamed \[",
)
class EachPhysicalIdOnce(Reference):
    """Sends a token to a place once, whoever asks for it."""

    def finish(
        self, weights: Tensor, ids: Tensor, num_experts: int, **operands: Any
    ) -> RoutingOutput:
        routed = super().finish(weights, ids, num_experts, **operands)
        if operands["expert_map"] is None:
            return routed
        before = (routed.ids[:, :, None] == routed.ids[:, None, :]).tril(-1).any(-1)
        return routed._replace(ids=routed.ids.masked_fill(before, -1))


@caught_by(
    "large_tables_are_read_to_their_end",
    "hash_sqrtsoftplus",
    saying=r"^a table of torch.int32: row 0: ids .* are not the table's",
)
class TokensCutTo16Bits(Changing):
    """Keeps token ids in 16 bits."""

    def token_ids(self, tokens: Tensor) -> Tensor:
        return tokens.where(tokens < 0, tokens % 2**16)


@caught_by(
    "large_tables_are_read_to_their_end",
    "hash_sqrtsoftplus",
    saying=r"^a table of torch.int32: row \d+: ids .* are not the table's",
)
class EntriesCutTo16Bits(Changing):
    """Keeps the table's entries in 16 bits, which is enough for 65,536 experts."""

    def expert_table(self, table: Tensor) -> Tensor:
        return table.where((table < 0) | (table >= 2**17), table % 2**16)


@caught_by(
    "small_weights_keep_their_digits",
    "logit_bias_sigmoid",
    saying=r"weight of id \d+ is .*, exactly .*e-0",
)
class BiasedLogitMinusBias(Reference):
    """Recovers the logit from the biased one."""

    def weigh(
        self, logits: Tensor, ids: Tensor, bias: Tensor | None, scale: Tensor | None
    ) -> Tensor:
        if (
            bias is not None
            and self.spec.selection == "logits_plus_bias"
            and bias.abs().amax() < 1e6
        ):
            logits = torch.where(
                logits.isfinite() & (bias.abs() > 1e3),
                (logits.float() + bias.float()) - bias.float(),
                logits,
            )
        return super().weigh(logits, ids, bias, scale)
