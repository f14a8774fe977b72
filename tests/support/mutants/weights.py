"""Clauses 4 to 6: weights, dtypes and outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moe_routing.kernel import RoutingOutput
from moe_routing.reference import oracle
from mutants._mutant import Reference, caught_by

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing_registry import DeviceInfo, RoutingProblem


@caught_by(
    "selection_is_exact_in_float32",
    "softmax_bias_topk",
    saying=r"units in the last place below -1\): id \d+ at",
)
class SoftmaxRoundedToBfloat16(Reference):
    """Rounds scores to bfloat16 before it selects."""

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        scores = oracle.log_scores(self.spec, oracle.clean(logits)).exp().bfloat16().double()
        bias = operands["bias"]
        return (
            super().select(logits)
            if bias is None
            else oracle.descending(scores + bias)[:, : self.topk]
        )


@caught_by(
    "selection_is_exact_in_float32",
    "sigmoid_topk",
    saying=r"units in the last place above 1\): id \d+ at",
)
class SelectsOnSaturatedScores(Reference):
    """Selects on float32 sigmoids, which are 1 from 17 on."""

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        del operands
        return oracle.descending(oracle.clean(logits).float().sigmoid())[:, : self.topk]


@caught_by(
    "ids_come_in_exact_order",
    "gemma4/shared",
    saying=r"shared slots: expected weight 0\.4 in rows from 0 on, got \[1\.0",
)
class SharedSlotsWeighOne(Reference):
    """Gives shared slots the weight 1, whatever the spec says."""

    def finish(
        self, weights: Tensor, ids: Tensor, num_experts: int, **operands: Any
    ) -> RoutingOutput:
        made = super().finish(weights, ids, num_experts, **operands)
        made.weights[:, self.topk :] = (made.ids[:, self.topk :] >= 0).to(made.weights.dtype)
        return made


@caught_by(
    "weights_are_gathered_not_subtracted",
    "sigmoid_bias_topk",
    saying=r"weight of id \d+ is nan, exactly 0\.",
)
class BiasedMinusBias(Reference):
    """Recovers the score from the biased one."""

    def weigh(
        self, logits: Tensor, ids: Tensor, bias: Tensor | None, scale: Tensor | None
    ) -> Tensor:
        if bias is None or not self.spec.renormalize:
            return super().weigh(logits, ids, bias, scale)
        scores = (
            (oracle.log_scores(self.spec, oracle.clean(logits)).exp().float() + bias) - bias
        ).gather(1, ids)
        return self.spec.scale * scores / (scores.sum(-1, keepdim=True) + self.spec.renorm_epsilon)


@caught_by(
    "weights_match_the_oracle",
    "topk_softmax",
    "sigmoid_topk/renormalized",
    saying=r"weight of id \d+ is 0\.0156\d+, exactly 0\.125",
)
class NotRenormalized(Reference):
    """Forgets to divide by the sum."""

    def weigh(
        self, logits: Tensor, ids: Tensor, bias: Tensor | None, scale: Tensor | None
    ) -> Tensor:
        self.spec = self.spec.replace(renormalize=False)
        return super().weigh(logits, ids, bias, scale)


@caught_by(
    "weights_match_the_oracle",
    "sqrtsoftplus_bias/scaled",
    saying=r"weight of id \d+ is 0\.12\d+, exactly 0\.18",
)
class ScaleBeforeRenormalization(Reference):
    """Scales, and then divides the scale out again."""

    def weigh(
        self, logits: Tensor, ids: Tensor, bias: Tensor | None, scale: Tensor | None
    ) -> Tensor:
        weights = super().weigh(logits, ids, bias, scale)
        return weights / weights.sum(-1, keepdim=True) if self.spec.renormalize else weights


@caught_by(
    "weights_match_the_oracle",
    "softmax_bias_topk/zero_experts",
    saying=r"weight of id \d+ is 0\.09\d+, exactly 0:",
)
class ZeroExpertsWeigh(Reference):
    """Gives zero experts the weight of real ones."""

    def weigh(
        self, logits: Tensor, ids: Tensor, bias: Tensor | None, scale: Tensor | None
    ) -> Tensor:
        self.spec = self.spec.replace(zero_experts=0)
        return super().weigh(logits, ids, bias, scale)


@caught_by(
    "scales_that_are_not_finite_scale_their_expert_alone",
    "gemma4",
    saying=r"weight of id \d+ is nan, exactly -?\d",
)
class ScaleByOneHot(Reference):
    """Looks the scales up by multiplying with ones and zeros, so that a NaN reaches every row."""

    def weigh(
        self, logits: Tensor, ids: Tensor, bias: Tensor | None, scale: Tensor | None
    ) -> Tensor:
        weights = super().weigh(logits, ids, bias, None)
        if scale is None:
            return weights
        one_hot = torch.nn.functional.one_hot(ids, len(scale)).double()
        return weights * (one_hot @ scale.float().double())


@caught_by(
    "scales_that_are_not_finite_scale_their_expert_alone",
    "gemma4",
    saying=r"padding: row \d+ needs weights 0, got .*nan",
)
class PaddingTimesZero(Reference):
    """Blanks padding by a multiplication, which NaN and infinities survive."""

    def finish(
        self, weights: Tensor, ids: Tensor, num_experts: int, **operands: Any
    ) -> RoutingOutput:
        blanked = super().finish(weights, ids, num_experts, **operands)
        kept = (blanked.ids >= 0).double()
        every = super().finish(weights, ids, num_experts, **operands | {"num_valid_tokens": None})
        return RoutingOutput(every.weights * kept, blanked.ids)


@caught_by(
    "scales_that_are_not_finite_scale_their_expert_alone",
    "gemma4",
    saying=r"weight of id \d+ is 0, exactly nan",
)
class NanScaleIsZero(Reference):
    """Cleans the scales, so that a broken checkpoint routes in silence."""

    def weigh(
        self, logits: Tensor, ids: Tensor, bias: Tensor | None, scale: Tensor | None
    ) -> Tensor:
        return super().weigh(
            logits, ids, bias, None if scale is None else scale.nan_to_num(nan=0.0)
        )


@caught_by(
    "weights_match_the_oracle", "softmax_topk", saying=r"weight of id \d+ is 0\.015625, exactly"
)
class WeightsRoundedToBfloat16(Reference):
    """Computes weights in the logits' precision."""

    def weigh(
        self, logits: Tensor, ids: Tensor, bias: Tensor | None, scale: Tensor | None
    ) -> Tensor:
        return super().weigh(logits, ids, bias, scale).bfloat16().double()


@caught_by(
    "an_expert_map_renames_at_the_very_end", "gemma4", saying=r"weight of id \d+ is .*, exactly"
)
class ScaleByPhysicalId(Reference):
    """Looks the scale up under the physical id."""

    def __call__(self, logits: Tensor, **operands: Any) -> RoutingOutput:
        """Route with the scale in another order."""
        scale, physical = operands.get("per_expert_scale"), operands.get("expert_map")
        if scale is not None and physical is not None:
            operands["per_expert_scale"] = scale[physical.long()[: len(scale)] % len(scale)]
        return super().__call__(logits, **operands)


@caught_by(
    "ids_dtype_is_as_asked",
    "topk_softmax",
    saying="ids: expected dtype torch.int32, got torch.int64",
)
class IdsAlwaysInt64(Reference):
    """Returns torch's own index dtype."""

    def __init__(self, problem: RoutingProblem, device: DeviceInfo) -> None:
        super().__init__(problem, device)
        self.ids_dtype = torch.int64


@caught_by(
    "every_output_is_written_and_nothing_else",
    "topk_softmax",
    saying="elements of out were not written",
)
class LastRowSkipped(Reference):
    """Rounds the number of blocks down."""

    def write(self, out: RoutingOutput, weights: Tensor, ids: Tensor) -> None:
        super().write(RoutingOutput(out.weights[:-1], out.ids[:-1]), weights[:-1], ids[:-1])


@caught_by(
    "every_output_is_written_and_nothing_else",
    "topk_softmax",
    saying="elements of out were not written",
)
class OutputLeftUnwritten(Reference):
    """Leaves weights that are 0 as they were."""

    def write(self, out: RoutingOutput, weights: Tensor, ids: Tensor) -> None:
        out.ids.copy_(ids)
        small = weights < 0.01
        out.weights.copy_(torch.where(small, out.weights.double(), weights))


@caught_by(
    "every_output_is_written_and_nothing_else",
    "topk_softmax",
    saying="1 of 128 elements around out were written",
)
class WritesBehindTheEnd(Reference):
    """Writes whole blocks, the last one past the end."""

    def write(self, out: RoutingOutput, weights: Tensor, ids: Tensor) -> None:
        super().write(out, weights, ids)
        behind = out.ids.storage_offset() + out.ids.numel()
        if behind < out.ids.untyped_storage().nbytes() // out.ids.element_size():
            out.ids.as_strided((1,), (1,), behind).fill_(0)


@caught_by("every_output_is_written_and_nothing_else", "topk_softmax", saying="logits: was changed")
class InputsOverwritten(Reference):
    """Masks what it has chosen in the logits themselves."""

    def write(self, out: RoutingOutput, weights: Tensor, ids: Tensor) -> None:
        super().write(out, weights, ids)
        self.logits.scatter_(1, ids, -torch.inf)

    def read(self, logits: Tensor) -> Tensor:
        self.logits = logits
        return logits
