"""Clauses 1 to 3: which experts are selected, in which order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moe_routing.reference import oracle
from mutants._mutant import Reference, caught_by

if TYPE_CHECKING:
    from torch import Tensor


@caught_by(
    "equal_scores_go_to_the_lower_id",
    "softmax_topk",
    saying="stands before id 62 although their scores are equal",
)
class TieToTheHighestId(Reference):
    """Sorts the other way round and reads it from behind."""

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        keys = oracle.selection_keys(self.spec, logits, bias=operands["bias"])
        return keys.sort(dim=-1, stable=True).indices.flip(1)[:, : self.topk]


@caught_by(
    "equal_scores_go_to_the_lower_id", "softmax_topk", saying="although their scores are equal"
)
class PlusZeroBeforeMinusZero(Reference):
    """Orders the bits, in which +0 is above -0."""

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        del operands
        bits = logits.float().contiguous().view(torch.int32)
        return (
            (bits ^ ((bits >> 31) & 0x7FFFFFFF))
            .sort(dim=-1, descending=True, stable=True)
            .indices[:, : self.topk]
        )


@caught_by("ids_come_in_exact_order", "softmax_topk", saying=r"stands before id \d+ \(score")
class IdsUnsorted(Reference):
    """Returns the right experts by ascending id."""

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        return super().select(logits, **operands).sort(dim=-1).values


@caught_by(
    "groups_are_scored_as_the_spec_says",
    "grouped_sigmoid_bias",
    saying="which are not among the best 4",
)
class GroupScoreByMaximum(Reference):
    """Scores groups by their best expert where the spec says the sum of two."""

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        return oracle.select(self.spec.replace(group_sum=1), logits, self.topk, **operands)


@caught_by(
    "groups_are_scored_as_the_spec_says",
    "grouped_sigmoid_bias/best_three",
    saying="which are not among the best 1",
)
class GroupScoreOfTwo(Reference):
    """Knows the sum of two, and takes it for the sum of three."""

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        return oracle.select(self.spec.replace(group_sum=2), logits, self.topk, **operands)


@caught_by(
    "groups_are_scored_as_the_spec_says",
    "grouped_sigmoid_bias/unbiased_groups",
    "grouped_softmax/best_four_scores",
    saying=r"which are not among the best \d",
)
class GroupsByWhatIsSelected(Reference):
    """Judges groups by what top-k looks at where the spec says the scores."""

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        return oracle.select(self.spec.replace(group_by="selection"), logits, self.topk, **operands)


@caught_by(
    "ids_come_in_exact_order", "grouped_sigmoid_bias", saying="which are not among the best 4"
)
class GroupsIgnored(Reference):
    """Selects among all experts."""

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        return oracle.select(
            self.spec.replace(num_groups=1, topk_groups=1), logits, self.topk, **operands
        )


@caught_by(
    "ids_come_in_exact_order", "grouped_sigmoid_bias", saying="which are not among the best 4"
)
class BiasIgnored(Reference):
    """Selects without the bias."""

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        return super().select(logits, **operands | {"bias": torch.zeros_like(logits[0])})


@caught_by(
    "group_sums_beyond_float32_are_equal",
    "grouped_sigmoid_bias",
    saying=r"are not among the best 4",
)
class GroupSumsInFloat64(Reference):
    """Adds the best two of a group in double precision, and does not clamp the sum."""

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        keys = oracle.selection_keys(self.spec, logits, bias=operands["bias"])
        if not self.spec.grouped or self.spec.group_sum == 1:
            return super().select(logits, **operands)
        groups = keys.unflatten(1, (self.spec.num_groups, -1))
        kept = oracle.descending(groups.topk(min(2, groups.shape[-1])).values.sum(-1))[
            :, : self.spec.topk_groups
        ]
        lost = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(1, kept, value=False)
        return oracle.descending(groups.masked_fill(lost[..., None], -torch.inf).flatten(1))[
            :, : self.topk
        ]


@caught_by("scores_below_minus_one_are_ranked_too", "sigmoid_bias_topk", saying="are not unique")
class RunningMaximumFromMinusOne(Reference):
    """Starts its running maximum at -1 and expert 0, so that nothing below is ever found."""

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        keys = oracle.selection_keys(self.spec, logits, bias=operands["bias"])
        ids = super().select(logits, **operands)
        return ids.masked_fill(keys.gather(1, ids) <= -1, 0) if self.spec.needs_bias else ids


@caught_by("ids_are_unique_and_in_range", "softmax_topk", saying="ids chosen twice")
class NanChosenTwice(Reference):
    """Masks what it has chosen by value, which NaN escapes."""

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        ids = super().select(logits, **operands)
        return ids.where(~logits.isnan().any(-1, keepdim=True), ids[:, :1])


@caught_by(
    "nan_and_inf_follow_the_rule",
    "softmax_topk",
    saying=r"\(one NaN\): id \d+ at position 0 \(score -3.4",
)
class NanFirst(Reference):
    """Sorts as torch does: NaN above everything."""

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        del operands
        return logits.float().sort(dim=-1, descending=True, stable=True).indices[:, : self.topk]


@caught_by(
    "nan_and_inf_follow_the_rule", "softmax_topk", saying=r"weight of id \d+ is nan, exactly 0\."
)
class InfMinusInf(Reference):
    """Takes a softmax of logits that were not clamped."""

    def weigh(
        self, logits: Tensor, ids: Tensor, bias: Tensor | None, scale: Tensor | None
    ) -> Tensor:
        del bias, scale
        return logits.double().softmax(-1).gather(1, ids)


@caught_by("nan_keeps_its_bias", "sigmoid_bias_topk", saying=r"stands before id 3 \(score 14\)")
class NanLosesItsBias(Reference):
    """Puts the experts of NaN logits last, whatever their biases."""

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        scores = oracle.log_scores(self.spec, oracle.clean(logits)).exp()
        biased = scores if operands["bias"] is None else scores + operands["bias"]
        return oracle.descending(biased.masked_fill(logits.isnan(), -torch.inf))[:, : self.topk]


@caught_by(
    "biases_that_are_not_finite_follow_the_rule",
    "sigmoid_bias_topk",
    saying=r"id \d+ at position 0 \(score -3.4",
)
class NanBiasFirst(Reference):
    """Ranks experts with a NaN bias as torch sorts them, above all others."""

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        bias = operands["bias"]
        best = (
            None
            if bias is None
            else bias.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        )
        return super().select(logits, **operands | {"bias": best})


@caught_by(
    "large_logits_do_not_overflow", "softmax_topk", saying=r"weight of id \d+ is nan, exactly 1"
)
class SoftmaxWithoutTheMaximum(Reference):
    """Exponentiates without subtracting the row's maximum."""

    def weigh(
        self, logits: Tensor, ids: Tensor, bias: Tensor | None, scale: Tensor | None
    ) -> Tensor:
        del bias, scale
        exponentials = oracle.clean(logits).float().exp()
        return (exponentials / exponentials.sum(-1, keepdim=True)).gather(1, ids)
