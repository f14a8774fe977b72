"""Deliberately wrong backends, one for each way in which some engine was wrong; the kit must catch every one.

Each is a small change of ``Reference``, a correct backend without any thought of speed. ``MUTANTS`` names the check
that must catch it; ``tests/testing/test_mutants.py`` holds the kit to that.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from moe_routing._kernel import RoutingOutput
from moe_routing._registry import registry
from moe_routing.reference import oracle
from moe_routing_registry import ANY, BackendSpec, RejectCode, Target, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from moe_routing_registry import DeviceInfo, RoutingProblem


class Reference:
    """A correct backend: the oracle's steps, rounded to float32 at the end. Mutants change one step."""

    def __init__(self, problem: RoutingProblem, device: DeviceInfo) -> None:
        self.spec, self.topk = problem.spec, problem.topk
        self.ids_dtype = {"int32": torch.int32, "int64": torch.int64}[problem.ids_dtype]
        del device

    @torch.no_grad()
    def __call__(self, logits: Tensor, *, out: RoutingOutput | None = None, **operands: Any) -> RoutingOutput:
        """Route, step by step."""
        logits = self.read(logits)
        selection = {name: operands.get(name) for name in ("bias", "token_ids", "expert_table")}
        ids = self.select(logits, **selection)
        weights = self.weigh(logits, ids, operands.get("bias"), operands.get("per_expert_scale"))
        finish = {name: operands.get(name) for name in ("num_valid_tokens", "expert_map")}
        weights, ids = self.finish(weights, ids, logits.shape[1], **finish)
        shape = (len(ids), ids.shape[1])
        if out is None:
            device = logits.device
            out = RoutingOutput(torch.empty(shape, device=device), torch.empty(shape, dtype=self.ids_dtype, device=device))
        self.write(out, weights, ids)
        return out

    def read(self, logits: Tensor) -> Tensor:
        """Return the logits where they lie."""
        return logits

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        """Return the ids of the selected."""
        return oracle.select(self.spec, logits, self.topk, **operands)

    def weigh(self, logits: Tensor, ids: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
        """Return their weights."""
        del bias
        return oracle.weights_at(self.spec, logits, ids, per_expert_scale=scale)

    def finish(self, weights: Tensor, ids: Tensor, num_experts: int, **operands: Any) -> RoutingOutput:
        """Append shared slots, rename, blank the padding."""
        return oracle.finish(self.spec, weights, ids, num_experts, **operands)

    def write(self, out: RoutingOutput, weights: Tensor, ids: Tensor) -> None:
        """Write the outputs."""
        out.weights.copy_(weights)
        out.ids.copy_(ids)


@dataclass(frozen=True, slots=True)
class Mutant:
    """A wrong backend.

    :ivar caught_by: name of the check that must catch it.
    :ivar variants: the variants whose cases are enough to catch it; all of them where empty.
    """

    factory: Callable[[RoutingProblem, DeviceInfo], Any]
    caught_by: str
    variants: tuple[str, ...] = ()
    supports: Callable[[RoutingProblem, DeviceInfo], Verdict] | None = None
    only_on: str = ""

    @property
    def name(self) -> str:
        """The class's name, as a backend is named."""
        return "mutant-" + "".join(f"-{c.lower()}" if c.isupper() else c for c in self.factory.__name__).strip("-")


MUTANTS: list[Mutant] = []


def caught_by(check: str, *variants: str, supports: Any = None, only_on: str = "") -> Callable[[Any], Any]:
    """Enter a mutant into the table, with the check that must catch it."""

    def enter(factory: Any) -> Any:
        MUTANTS.append(Mutant(factory, check, variants, supports, only_on))
        return factory

    return enter


@contextlib.contextmanager
def registered(mutant: Mutant) -> Iterator[str]:
    """Register a mutant (or the reference, as a mutant of nothing) as a backend inside the block, and yield its name."""
    card = BackendSpec(
        name=mutant.name,
        factory=f"{__name__}:{mutant.factory.__name__}",
        targets=(Target(ANY),),
        supports=mutant.supports,
    )
    registry().register(card)
    try:
        yield card.name
    finally:
        registry().unregister(card.name)


# Clause 1


@caught_by("equal_scores_go_to_the_lower_id", "softmax_topk")
class TieToTheHighestId(Reference):
    """Sorts the other way round and reads it from behind."""

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        keys = oracle.selection_keys(self.spec, logits, bias=operands["bias"])
        return keys.sort(dim=-1, stable=True).indices.flip(1)[:, : self.topk]


@caught_by("equal_scores_go_to_the_lower_id", "softmax_topk")
class PlusZeroBeforeMinusZero(Reference):
    """Orders the bits, in which +0 is above -0."""

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        del operands
        bits = logits.float().contiguous().view(torch.int32)
        return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).sort(dim=-1, descending=True, stable=True).indices[:, : self.topk]


@caught_by("ids_come_in_exact_order", "softmax_topk")
class IdsUnsorted(Reference):
    """Returns the right experts by ascending id."""

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        return super().select(logits, **operands).sort(dim=-1).values


@caught_by("groups_are_scored_as_the_spec_says", "grouped_sigmoid_bias")
class GroupScoreByMaximum(Reference):
    """Scores groups by their best expert where the spec says the sum of two."""

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        return oracle.select(self.spec.replace(group_score="max"), logits, self.topk, **operands)


@caught_by("ids_come_in_exact_order", "grouped_sigmoid_bias")
class GroupsIgnored(Reference):
    """Selects among all experts."""

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        return oracle.select(self.spec.replace(num_groups=1, topk_groups=1), logits, self.topk, **operands)


@caught_by("ids_come_in_exact_order", "grouped_sigmoid_bias")
class BiasIgnored(Reference):
    """Selects without the bias."""

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        return super().select(logits, **operands | {"bias": torch.zeros_like(logits[0])})


# Clauses 2 and 3


@caught_by("scores_below_minus_one_are_ranked_too", "sigmoid_bias_topk")
class RunningMaximumFromMinusOne(Reference):
    """Starts its running maximum at -1 and expert 0, so that nothing below is ever found."""

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        keys = oracle.selection_keys(self.spec, logits, bias=operands["bias"])
        ids = super().select(logits, **operands)
        return ids.masked_fill(keys.gather(1, ids) <= -1, 0) if self.spec.needs_bias else ids


@caught_by("ids_are_unique_and_in_range", "softmax_topk")
class NanChosenTwice(Reference):
    """Masks what it has chosen by value, which NaN escapes."""

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        ids = super().select(logits, **operands)
        return ids.where(~logits.isnan().any(-1, keepdim=True), ids[:, :1])


@caught_by("nan_and_inf_follow_the_rule", "softmax_topk")
class NanFirst(Reference):
    """Sorts as torch does: NaN above everything."""

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        del operands
        return logits.float().sort(dim=-1, descending=True, stable=True).indices[:, : self.topk]


@caught_by("nan_and_inf_follow_the_rule", "softmax_topk")
class InfMinusInf(Reference):
    """Takes a softmax of logits that were not clamped."""

    def weigh(self, logits: Tensor, ids: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
        del bias, scale
        return logits.double().softmax(-1).gather(1, ids)


@caught_by("nan_keeps_its_bias", "sigmoid_bias_topk")
class NanLosesItsBias(Reference):
    """Puts the experts of NaN logits last, whatever their biases."""

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        scores = oracle.log_scores(self.spec, oracle.clean(logits)).exp()
        biased = scores if operands["bias"] is None else scores + operands["bias"]
        return oracle.descending(biased.masked_fill(logits.isnan(), -torch.inf))[:, : self.topk]


@caught_by("large_logits_do_not_overflow", "softmax_topk")
class SoftmaxWithoutTheMaximum(Reference):
    """Exponentiates without subtracting the row's maximum."""

    def weigh(self, logits: Tensor, ids: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
        del bias, scale
        exponentials = oracle.clean(logits).float().exp()
        return (exponentials / exponentials.sum(-1, keepdim=True)).gather(1, ids)


# Clauses 4, 5 and 6


@caught_by("selection_is_exact_in_float32", "softmax_bias_topk")
class SoftmaxRoundedToBfloat16(Reference):
    """Rounds scores to bfloat16 before it selects."""

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        scores = oracle.log_scores(self.spec, oracle.clean(logits)).exp().bfloat16().double()
        bias = operands["bias"]
        return super().select(logits) if bias is None else oracle.descending(scores + bias)[:, : self.topk]


@caught_by("selection_is_exact_in_float32", "sigmoid_topk")
class SelectsOnSaturatedScores(Reference):
    """Selects on float32 sigmoids, which are 1 from 17 on."""

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        del operands
        return oracle.descending(oracle.clean(logits).float().sigmoid())[:, : self.topk]


@caught_by("weights_are_gathered_not_subtracted", "sigmoid_bias_topk")
class BiasedMinusBias(Reference):
    """Recovers the score from the biased one."""

    def weigh(self, logits: Tensor, ids: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
        if bias is None or not self.spec.renormalize:
            return super().weigh(logits, ids, bias, scale)
        scores = ((oracle.log_scores(self.spec, oracle.clean(logits)).exp().float() + bias) - bias).gather(1, ids)
        return self.spec.scale * scores / (scores.sum(-1, keepdim=True) + self.spec.renorm_epsilon)


@caught_by("weights_match_the_oracle", "topk_softmax", "sigmoid_topk/renormalized")
class NotRenormalized(Reference):
    """Forgets to divide by the sum."""

    def weigh(self, logits: Tensor, ids: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
        self.spec = self.spec.replace(renormalize=False)
        return super().weigh(logits, ids, bias, scale)


@caught_by("weights_match_the_oracle", "sqrtsoftplus_bias/scaled")
class ScaleBeforeRenormalization(Reference):
    """Scales, and then divides the scale out again."""

    def weigh(self, logits: Tensor, ids: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
        weights = super().weigh(logits, ids, bias, scale)
        return weights / weights.sum(-1, keepdim=True) if self.spec.renormalize else weights


@caught_by("weights_match_the_oracle", "softmax_bias_topk/zero_experts")
class ZeroExpertsWeigh(Reference):
    """Gives zero experts the weight of real ones."""

    def weigh(self, logits: Tensor, ids: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
        self.spec = self.spec.replace(zero_experts=0)
        return super().weigh(logits, ids, bias, scale)


@caught_by("weights_match_the_oracle", "softmax_topk")
class WeightsRoundedToBfloat16(Reference):
    """Computes weights in the logits' precision."""

    def weigh(self, logits: Tensor, ids: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
        return super().weigh(logits, ids, bias, scale).bfloat16().double()


@caught_by("an_expert_map_renames_at_the_very_end", "gemma4")
class ScaleByPhysicalId(Reference):
    """Looks the scale up under the physical id."""

    def __call__(self, logits: Tensor, **operands: Any) -> RoutingOutput:
        """Route with the scale in another order."""
        scale, physical = operands.get("per_expert_scale"), operands.get("expert_map")
        if scale is not None and physical is not None:
            operands["per_expert_scale"] = scale[physical.long()[: len(scale)] % len(scale)]
        return super().__call__(logits, **operands)


@caught_by("ids_dtype_is_as_asked", "topk_softmax")
class IdsAlwaysInt64(Reference):
    """Returns torch's own index dtype."""

    def __init__(self, problem: RoutingProblem, device: DeviceInfo) -> None:
        super().__init__(problem, device)
        self.ids_dtype = torch.int64


@caught_by("every_output_is_written_and_nothing_else", "topk_softmax")
class LastRowSkipped(Reference):
    """Rounds the number of blocks down."""

    def write(self, out: RoutingOutput, weights: Tensor, ids: Tensor) -> None:
        super().write(RoutingOutput(out.weights[:-1], out.ids[:-1]), weights[:-1], ids[:-1])


@caught_by("every_output_is_written_and_nothing_else", "topk_softmax")
class OutputLeftUnwritten(Reference):
    """Leaves weights that are 0 as they were."""

    def write(self, out: RoutingOutput, weights: Tensor, ids: Tensor) -> None:
        out.ids.copy_(ids)
        small = weights < 0.01
        out.weights.copy_(torch.where(small, out.weights.double(), weights))


@caught_by("every_output_is_written_and_nothing_else", "topk_softmax")
class WritesBehindTheEnd(Reference):
    """Writes whole blocks, the last one past the end."""

    def write(self, out: RoutingOutput, weights: Tensor, ids: Tensor) -> None:
        super().write(out, weights, ids)
        behind = out.ids.storage_offset() + out.ids.numel()
        if behind < out.ids.untyped_storage().nbytes() // out.ids.element_size():
            out.ids.as_strided((1,), (1,), behind).fill_(0)


@caught_by("every_output_is_written_and_nothing_else", "topk_softmax")
class InputsOverwritten(Reference):
    """Masks what it has chosen in the logits themselves."""

    def write(self, out: RoutingOutput, weights: Tensor, ids: Tensor) -> None:
        super().write(out, weights, ids)
        self.logits.scatter_(1, ids, -torch.inf)

    def read(self, logits: Tensor) -> Tensor:
        self.logits = logits
        return logits


# Clauses 8 and 9


@caught_by("any_strides_are_read_as_they_lie", "topk_softmax")
class TransposedStridesIgnored(Reference):
    """Reads the memory as if it were contiguous."""

    def read(self, logits: Tensor) -> Tensor:
        last = sum((n - 1) * s for n, s in zip(logits.shape, logits.stride(), strict=True))
        return logits if last + 1 < logits.numel() else logits.as_strided(logits.shape, (logits.shape[1], 1))


@caught_by("any_strides_are_read_as_they_lie", "topk_softmax")
class RowZeroForOneToken(Reference):
    """Reads row 0 of the storage if there is one token."""

    def read(self, logits: Tensor) -> Tensor:
        return logits.as_strided(logits.shape, logits.stride(), 0) if len(logits) == 1 else logits


@caught_by("offsets_past_2_31_are_read", "topk_softmax")
class Int32Offsets(Reference):
    """Computes row offsets in 32 bits, which wrap (here: to the row itself, less 2**31)."""

    def read(self, logits: Tensor) -> Tensor:
        offsets = [row * logits.stride(0) % 2**31 for row in range(len(logits))]
        return torch.stack(
            [logits.as_strided((logits.shape[1],), (logits.stride(1),), logits.storage_offset() + o) for o in offsets]
        )


@caught_by("row_strides_cost_no_copy", "topk_softmax")
class CopiesSlicedLogits(Reference):
    """Calls contiguous() on whatever comes."""

    def read(self, logits: Tensor) -> Tensor:
        return logits.contiguous()


# Clauses 10 to 13


@caught_by("a_rows_bits_do_not_depend_on_its_batch", "topk_softmax")
class RoundsByTheBatch(Reference):
    """Takes another path, with another rounding, for a few rows."""

    def weigh(self, logits: Tensor, ids: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
        weights = super().weigh(logits, ids, bias, scale)
        return weights if len(logits) > 16 else (weights.float() * 3 / 3).double() * (1 + 2**-23)


@caught_by("the_same_input_gives_the_same_bits", "topk_softmax")
class TiesAtRandom(Reference):
    """Lets the fastest thread win a tie."""

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        del operands
        order = torch.randperm(logits.shape[1], device=logits.device)
        return order[oracle.descending(oracle.clean(logits)[:, order])[:, : self.topk]]


@caught_by("outputs_are_contiguous", "topk_softmax")
class IdsAreAView(Reference):
    """Returns the first K of all E sorted ids, whose rows are E apart in memory."""

    def __call__(self, logits: Tensor, *, out: RoutingOutput | None = None, **operands: Any) -> RoutingOutput:
        """Route, and widen the memory of the ids."""
        weights, ids = super().__call__(logits, out=out, **operands)
        wide = ids.new_zeros(len(ids), logits.shape[1] + 1)[:, : ids.shape[1]]
        return RoutingOutput(weights, ids if out is not None else wide.copy_(ids))


@caught_by("each_call_uses_its_own_inputs_in_stream_order", "topk_softmax")
class WrongStream(Reference):
    """Reads what the logits held before: as a kernel on another stream, which does not wait."""

    before: Tensor | None = None

    def read(self, logits: Tensor) -> Tensor:
        stale, self.before = self.before, logits.clone()
        return stale if stale is not None and stale.shape == logits.shape else logits


@caught_by("each_call_uses_its_own_inputs_in_stream_order", "topk_softmax")
class OneOutputForAllCalls(Reference):
    """Keeps its outputs, and hands the same memory out again."""

    kept: RoutingOutput | None = None

    def __call__(self, logits: Tensor, *, out: RoutingOutput | None = None, **operands: Any) -> RoutingOutput:
        """Route into the memory of the call before."""
        if out is None and self.kept is not None and len(self.kept.ids) == len(logits):
            out = self.kept
        self.kept = super().__call__(logits, out=out, **operands)
        return self.kept


@caught_by("nothing_is_read_on_the_host", "topk_softmax", only_on="cuda")
class ReadsOnTheHost(Reference):
    """Asks the device for a number before it goes on."""

    def read(self, logits: Tensor) -> Tensor:
        return logits if logits.sum().item() else logits.clone()


@caught_by("padding_is_blank", "topk_softmax")
class PaddingIgnored(Reference):
    """Routes padding like any row."""

    def finish(self, weights: Tensor, ids: Tensor, num_experts: int, **operands: Any) -> RoutingOutput:
        return super().finish(weights, ids, num_experts, **operands | {"num_valid_tokens": None})


@caught_by("padding_is_blank", "topk_softmax")
class PaddingKeepsItsWeights(Reference):
    """Blanks ids and leaves weights."""

    def write(self, out: RoutingOutput, weights: Tensor, ids: Tensor) -> None:
        super().write(out, weights.masked_fill(ids < 0, 0.5), ids)


@caught_by("tokens_without_experts_are_padding", "hash_sqrtsoftplus")
class TokenIdsWrapAround(Reference):
    """Looks up token id -1 from the end of the table, and the nearest token of the table for others that it lacks."""

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        table, tokens = operands["expert_table"], operands["token_ids"]
        assert table is not None
        assert tokens is not None
        tokens = torch.where((tokens < 0) & (tokens >= -len(table)), tokens + len(table), tokens).clamp(0, len(table) - 1)
        return oracle.select(self.spec, logits, self.topk, **operands | {"token_ids": tokens})


@caught_by("tokens_without_experts_are_padding", "hash_sqrtsoftplus")
class EntriesCutTo32Bits(Reference):
    """Compares an entry of the table with E after it was narrowed to int32."""

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        table = operands["expert_table"]
        assert table is not None
        return oracle.select(self.spec, logits, self.topk, **operands | {"expert_table": table.to(torch.int32)})


@caught_by("tokens_without_experts_are_padding", "hash_sqrtsoftplus")
class StrayEntriesOnlyLoseTheirWeight(Reference):
    """Gives a stray entry of the table the weight 0, and routes the row to the others."""

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        table = operands["expert_table"]
        assert table is not None
        inside = table.clamp(0, logits.shape[1] - 1)
        return oracle.select(self.spec, logits, self.topk, **operands | {"expert_table": inside})


# Clause 15


@caught_by("gradients_match_autograd_through_the_oracle", "topk_softmax")
class GradientWithoutTheSum(Reference):
    """Brings a backward that forgets how the denominator depends on the logits."""

    def backward(self, grad_weights: Tensor, logits: Tensor, ids: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return ``grad * w`` at the chosen ids, and no gradient of the scale."""
        weights = self.weigh(logits.detach(), ids.long(), None, scale).float()
        grad = torch.zeros_like(logits).scatter_add(1, ids.long(), (grad_weights * weights).to(logits.dtype))
        return grad, logits.new_empty(0) if scale is None else torch.zeros_like(scale)


# Clause 0


def _decline(problem: RoutingProblem, device: DeviceInfo) -> Verdict:
    del problem, device
    return Verdict.no(RejectCode.SHAPE, "is for E = 0 only")


@caught_by("it_serves_the_families_on_its_card", supports=_decline)
class DeclinesEverything(Reference):
    """Takes part in nothing, and so fails nothing."""


def _decline_strides(problem: RoutingProblem, device: DeviceInfo) -> Verdict:
    del device
    return Verdict.no(RejectCode.LAYOUT, "reads rows only") if problem.layout == "strided" else Verdict.yes()


@caught_by("what_it_declines_cannot_be_had", "topk_softmax", supports=_decline_strides)
class DeclinesWhatItCan(Reference):
    """Declines strided logits, which it routes as well as any."""


@caught_by("what_it_accepts_it_routes", "topk_softmax")
class AcceptsEverythingAndRaises(Reference):
    """Says yes to every problem, and then cannot."""

    def __init__(self, problem: RoutingProblem, device: DeviceInfo) -> None:
        super().__init__(problem, device)
        msg = f"no kernel for {problem}"
        raise RuntimeError(msg)
