"""Clause 16: recorded ids."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moe_routing.formula import weights_backward
from moe_routing.reference import oracle
from mutants._mutant import Reference, caught_by

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.kernel import RoutingOutput


@caught_by("recorded_ids_are_weighed", "topk_softmax", saying=r"row 1: ids .* are not the recorded")
class RecordIgnored(Reference):
    """Selects whatever was recorded."""

    def replay(self, recorded: Tensor, usual: Tensor, num_experts: int) -> Tensor:
        ids = super().replay(recorded, usual, num_experts)
        return usual.where((ids >= 0).any(-1, keepdim=True), ids)


@caught_by(
    "recorded_ids_are_weighed", "sigmoid_bias_topk", saying=r"row 1: ids .* are not the recorded"
)
class RecordSorted(Reference):
    """Returns the recorded experts in the order of their ids."""

    def replay(self, recorded: Tensor, usual: Tensor, num_experts: int) -> Tensor:
        ids = super().replay(recorded, usual, num_experts)
        return ids.sort(dim=-1).values.where((recorded != -1).any(-1, keepdim=True), ids)


@caught_by("recorded_ids_are_weighed", "topk_softmax", saying=r"row 0: ids \[-1, .* not all in")
class NoRecordIsPadding(Reference):
    """Takes a row without a record for padding."""

    def replay(self, recorded: Tensor, usual: Tensor, num_experts: int) -> Tensor:
        ids = super().replay(recorded, usual, num_experts)
        return ids.masked_fill((recorded == -1).all(-1, keepdim=True), -1)


@caught_by("recorded_ids_are_weighed", "topk_softmax", saying=r"row 3: ids .* not the recorded")
class AnEmptySlotIsNoRecord(Reference):
    """Routes a row as usual if one of its slots is -1."""

    def replay(self, recorded: Tensor, usual: Tensor, num_experts: int) -> Tensor:
        ids = super().replay(recorded, usual, num_experts)
        return usual.where((recorded == -1).any(-1, keepdim=True), ids)


@caught_by(
    "recorded_ids_are_weighed",
    "topk_softmax",
    "sigmoid_bias_topk",
    saying=r"row 3: weight of id \d+ is .*, exactly",
)
class RenormalizedWithTheFirstExpert(Reference):
    """Reads the logit of expert 0 for a slot without an expert, and counts it."""

    def weigh(
        self, logits: Tensor, ids: Tensor, bias: Tensor | None, scale: Tensor | None
    ) -> Tensor:
        del bias
        counted = oracle.weights_at(self.spec, logits, ids.clamp(min=0), per_expert_scale=scale)
        return counted.masked_fill(ids < 0, 0.0)


@caught_by(
    "slots_without_an_expert_weigh_nothing",
    "sparsemixer",
    saying=r"^a first logit of inf: row \d+: weight of id \d+ is",
)
class AnEmptyRoundTakesTheFirstExpert(RenormalizedWithTheFirstExpert):
    """Strikes expert 0 out in a round without an expert."""


@caught_by("recorded_ids_are_weighed", "gemma4/shared", saying=r"weight 0\.4 in rows from")
class AnEmptySlotBlanksTheSharedExperts(Reference):
    """Takes a row with an empty slot for padding as far as shared experts go."""

    def finish(
        self, weights: Tensor, ids: Tensor, num_experts: int, **operands: Any
    ) -> RoutingOutput:
        made = super().finish(weights, ids, num_experts, **operands)
        some = (ids < 0).any(-1, keepdim=True).expand_as(made.ids).clone()
        some[:, : self.topk] = False
        return made._replace(weights=made.weights.masked_fill(some, 0.0))


@caught_by("recorded_ids_are_weighed", "topk_softmax", saying="^ids: were changed")
class RecordClampedInPlace(Reference):
    """Makes indices of the caller's record."""

    def replay(self, recorded: Tensor, usual: Tensor, num_experts: int) -> Tensor:
        ids = super().replay(recorded, usual, num_experts)
        recorded.clamp_(min=0)
        return ids


@caught_by(
    "ids_that_no_expert_has_are_padding",
    "topk_softmax",
    saying=r"^ids of 64: padding: row 0 needs ids -1",
)
class OutsideIsTheLastExpert(Reference):
    """Clamps ids to those that there are."""

    def replay(self, recorded: Tensor, usual: Tensor, num_experts: int) -> Tensor:
        return super().replay(recorded.clamp(max=num_experts - 1), usual, num_experts)


@caught_by(
    "ids_that_no_expert_has_are_padding",
    "topk_softmax",
    saying=r"^ids of 4294967296: padding: row 0 needs ids -1",
)
class RecordCutTo32Bits(Reference):
    """Reads the low half of each id."""

    def replay(self, recorded: Tensor, usual: Tensor, num_experts: int) -> Tensor:
        return super().replay(recorded.to(torch.int32), usual, num_experts)


@caught_by(
    "a_record_may_have_any_integer_dtype",
    "topk_softmax",
    saying=r"^ids of torch.int16: padding|^ids of torch.int16: row",
)
class Int16IsUnsigned(Reference):
    """Reads int16 as some engines write it."""

    def replay(self, recorded: Tensor, usual: Tensor, num_experts: int) -> Tensor:
        if recorded.dtype == torch.int16:
            recorded = recorded.int() & 0xFFFF
        return super().replay(recorded, usual, num_experts)


@caught_by(
    "a_record_gives_the_bits_of_the_call_that_made_it",
    "topk_softmax",
    saying=r"^a record of all rows: weights of row \d+",
)
class AnotherFormulaForRecords(Reference):
    """Weighs recorded experts by another kernel, one rounding away."""

    recorded = False

    def __call__(self, logits: Tensor, **operands: Any) -> RoutingOutput:
        """Remember whether ids were recorded, and route."""
        self.recorded = operands.get("ids") is not None
        return super().__call__(logits, **operands)

    def weigh(
        self, logits: Tensor, ids: Tensor, bias: Tensor | None, scale: Tensor | None
    ) -> Tensor:
        exact = super().weigh(logits, ids, bias, scale)
        return exact * (1 + 2.0**-22) if self.recorded else exact


@caught_by(
    "slots_without_an_expert_weigh_nothing",
    "gemma4",
    saying=r"^a first scale of (nan|inf): row \d+: weight of id -1 is nan, exactly 0",
)
class AnEmptySlotIsScaled(Reference):
    """Multiplies the weight 0 of a slot without an expert by the first scale."""

    def weigh(
        self, logits: Tensor, ids: Tensor, bias: Tensor | None, scale: Tensor | None
    ) -> Tensor:
        weights = super().weigh(logits, ids, bias, scale)
        if scale is None:
            return weights
        empty = (ids < 0) & ~(ids < 0).all(-1, keepdim=True)
        return weights.where(~empty, weights * scale.float()[0])


@caught_by(
    "a_bias_does_not_weigh_what_is_recorded",
    "sigmoid_bias_topk",
    saying=r"^row \d+: weight of id \d+ is|^a bias of",
)
class BiasedWeights(Reference):
    """Weighs recorded experts by what would be selected on."""

    def weigh(
        self, logits: Tensor, ids: Tensor, bias: Tensor | None, scale: Tensor | None
    ) -> Tensor:
        weights = super().weigh(logits, ids, bias, scale)
        if bias is None:
            return weights
        return weights * (1 + bias.float().nan_to_num(nan=0.0)[ids.clamp(min=0)].double())


@caught_by(
    "gradients_are_those_at_the_recorded_experts",
    "topk_softmax",
    "sigmoid_bias_topk",
    saying=r"^gradient of logits at",
)
class GradientOfFullRows(Reference):
    """Goes back through a renormalisation that counts slots without an expert."""

    def backward(
        self, grad_weights: Tensor, logits: Tensor, ids: Tensor, scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the closed form's gradients for ids of which none is missing."""
        return weights_backward(self.spec, grad_weights, logits, ids, scale)
