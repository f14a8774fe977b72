"""Wrong transports, and changes of the product that make every transport wrong.

Each is a small change of a right transport, the built-in one of its mode. They run on the ranks of
``tests/conformance/exchange_rank.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moe_routing import _check as every_check
from moe_routing.distributed import CapacityError, ExpertParallel, _agreement, _check
from moe_routing_backends.all_reduce import exchange as all_reduce
from moe_routing_backends.all_to_all import exchange as all_to_all
from moe_routing_registry import RejectCode, Verdict
from mutants._change import Change, elements_are_shown
from mutants._mutant import Mutant

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from torch.distributed import ProcessGroup

    from moe_routing.distributed import ExchangeProblem, Received, Tokens
    from moe_routing_registry import DeviceInfo

MUTANTS: list[Mutant] = []


class Transport:
    """A right transport: a kernel, and what it returns for a group."""

    def __init__(self, problem: ExchangeProblem, device: DeviceInfo) -> None:
        self.problem = problem
        home = all_reduce if problem.shared_batch else all_to_all
        self.make = home.build(problem, device)

    def __call__(self, group: ProcessGroup) -> Transport:
        """Serve a group."""
        self.right = self.make(group)
        return self

    def dispatch(self, tokens: Tokens) -> Received:
        """Send tokens."""
        return self.right.dispatch(tokens)

    def combine(self, rows: Tensor, received: Received) -> Tensor:
        """Return results."""
        return self.right.combine(rows, received)


def _fits(problem: ExchangeProblem, _device: DeviceInfo) -> Verdict:
    if problem.shared_batch and problem.reduce == "none":
        return Verdict.no(RejectCode.GROUP, "sums on each rank")
    return Verdict.yes()


def caught_by(
    check: str,
    *,
    saying: str,
    supports: Any = _fits,
    gaps: dict[str, str] | None = None,
    on: str = "",
) -> Callable[[Any], Any]:
    """Enter a mutant into the table."""
    known = {"group": "partial sums are of each rank"} if supports is _fits else {}

    def enter(factory: Any) -> Any:
        MUTANTS.append(
            Mutant(
                factory, check, saying, supports=supports, operation="exchange",
                gaps=known | (gaps or {}), only_on=on,
            )
        )  # fmt: skip
        return factory

    return enter


@caught_by("what_it_accepts_works", saying="plan.counts|rows", supports=None)
class TakesASharedBatch(Transport):
    """Sends what every rank has already."""

    def __init__(self, problem: ExchangeProblem, device: DeviceInfo) -> None:
        super().__init__(problem, device)
        self.make = all_to_all.build(problem, device)


def _declines_padding(problem: ExchangeProblem, device: DeviceInfo) -> Verdict:
    if problem.max_tokens:
        return Verdict.no(RejectCode.SHAPE, "does not pad")
    return _fits(problem, device)


@caught_by(
    "what_it_declines_fails", saying="gets it right", supports=_declines_padding,
    gaps={"group": "partial sums"},
)  # fmt: skip
class DeclinesWhatItCan(Transport):
    """Is built for what it declines, and right."""


@caught_by("a_declared_gap_is_real", saying="declines nothing for it", gaps={"dtype": "fp8"})
class DeclaresAGapOfNothing(Transport):
    """Serves every dtype all the same."""


@caught_by("rows_arrive_in_order_bit_for_bit", saying="rows")
class RowsOfTheNextToken(Transport):
    """Sends another token's row."""

    def dispatch(self, tokens: Tokens) -> Received:
        return super().dispatch(tokens._replace(hidden=tokens.hidden.roll(1, 0)))


@caught_by("rows_arrive_in_order_bit_for_bit", saying="scales")
class ScalesOfTheNextToken(Transport):
    """Sends another token's scales."""

    def dispatch(self, tokens: Tokens) -> Received:
        if tokens.scales is not None:
            tokens = tokens._replace(scales=tokens.scales.roll(1, 0))
        return super().dispatch(tokens)


@caught_by("rows_arrive_in_order_bit_for_bit", saying="rows: [0-9]+ of")
class LastRankFirst(Transport):
    """Lets rows of later ranks and tokens arrive first."""

    def dispatch(self, tokens: Tokens) -> Received:
        got = super().dispatch(tokens)
        flipped = [None if part is None else part.flip(0) for part in got[:4]]
        return type(got)(*flipped, got.state)

    def combine(self, rows: Tensor, received: Received) -> Tensor:
        return super().combine(rows.flip(0), received)


@caught_by("what_arrives_names_experts_of_this_rank", saying="expected int32")
class LongIds(Transport):
    """Returns ids in int64."""

    def dispatch(self, tokens: Tokens) -> Received:
        got = super().dispatch(tokens)
        return got._replace(ids=got.ids.long())


@caught_by("what_arrives_names_experts_of_this_rank", saying="neither an expert")
class StraysAreLarge(Transport):
    """Marks slots without an expert by a number beyond all experts."""

    def dispatch(self, tokens: Tokens) -> Received:
        got = super().dispatch(tokens)
        return got._replace(ids=torch.where(got.ids < 0, 10_000, got.ids))


@caught_by("results_come_back_weighted_and_summed", saying="results")
class WeightsInHalfPrecision(Transport):
    """Rounds the weights on the way."""

    def dispatch(self, tokens: Tokens) -> Received:
        return super().dispatch(tokens._replace(weights=tokens.weights.bfloat16()))


@caught_by("drawn_exchanges_are_right", saying="results")
class ResultsOfTheNextToken(Transport):
    """Returns another token's sum."""

    def combine(self, rows: Tensor, received: Received) -> Tensor:
        return super().combine(rows, received).roll(1, 0)


@caught_by("unreduced_rows_give_the_bits_of_one_rank", saying="other bits")
class LastSlotFirst(Transport):
    """Sums the slots from the last to the first."""

    def combine(self, rows: Tensor, received: Received) -> Tensor:
        plan, splits, weights = received.state
        if weights is None:
            return super().combine(rows, received)
        plan = plan._replace(inverse=plan.inverse.flip(1).contiguous())
        state = type(received.state)(plan, splits, weights.flip(1))
        return super().combine(rows, received._replace(state=state))


@caught_by("padding_and_repeated_ids_are_exchanged", saying="plan.counts")
class PaddingGoesToTheFirst(Transport):
    """Takes -1 for expert 0."""

    def dispatch(self, tokens: Tokens) -> Received:
        return super().dispatch(tokens._replace(ids=tokens.ids.clamp(min=0)))


@caught_by("padding_and_repeated_ids_are_exchanged", saying="plan.counts")
class EachExpertOnce(Transport):
    """Leaves out an id that stood in an earlier slot of the row."""

    def dispatch(self, tokens: Tokens) -> Received:
        ids = tokens.ids
        earlier = (ids[:, :, None] == ids[:, None, :]).tril(-1).any(2)
        return super().dispatch(tokens._replace(ids=ids.masked_fill(earlier, -1)))


@caught_by("ranks_without_tokens_take_part", saying="plan.counts")
class NoRankIsIdle(Transport):
    """Sends a token that nobody has, where a rank has none."""

    def dispatch(self, tokens: Tokens) -> Received:
        if not len(tokens.ids):
            tokens = type(tokens)(
                *(None if part is None else part.new_zeros(1, part.shape[1]) for part in tokens)
            )
        return super().dispatch(tokens)


@caught_by("operands_of_any_strides_stay_as_they_are", saying="weights was changed")
class WeighsInPlace(Transport):
    """Writes into its operands."""

    def combine(self, rows: Tensor, received: Received) -> Tensor:
        made = super().combine(rows, received)
        self.tokens.weights.mul_(0.5)
        return made

    def dispatch(self, tokens: Tokens) -> Received:
        self.tokens = tokens
        return super().dispatch(tokens)


@caught_by("the_same_call_gives_the_same_bits", saying="other bits|another call")
class SendsTheFirstTokensAgain(Transport):
    """Keeps the hidden states of its first call."""

    first = None

    def dispatch(self, tokens: Tokens) -> Received:
        kept = self.first
        if kept is None or kept.shape != tokens.hidden.shape:
            self.first = kept = tokens.hidden
        return super().dispatch(tokens._replace(hidden=kept))


@caught_by("operands_changed_in_place_are_read_again", saying="changed in place")
class IdsKept(Transport):
    """Keeps the ids of its first call, as long as they lie in the same memory."""

    def __call__(self, group: ProcessGroup) -> Transport:
        self.kept: dict[int, Tensor] = {}
        return super().__call__(group)

    def dispatch(self, tokens: Tokens) -> Received:
        key = tokens.ids.data_ptr()
        return super().dispatch(tokens._replace(ids=self.kept.setdefault(key, tokens.ids.clone())))


@caught_by("two_layers_may_be_in_flight", saying="two layers at once")
class OneBufferForAllLayers(Transport):
    """Returns the results of whatever was dispatched last."""

    latest: Any = None

    def dispatch(self, tokens: Tokens) -> Received:
        type(self).latest = super().dispatch(tokens)
        return self.latest

    def combine(self, rows: Tensor, received: Received) -> Tensor:
        latest = type(self).latest
        if latest.state is None:  # an all-reduce keeps nothing
            return super().combine(rows, received)
        if rows.shape[0] == latest.ids.shape[0]:
            return super().combine(rows, latest)
        return super().combine(rows.new_zeros(latest.ids.shape[0], rows.shape[1]), latest)


@caught_by("what_a_call_returned_stays", saying="a later call changed")
class LendsRowsWithoutAWord(Transport):
    """Returns rows in memory of its own, which it fills again in the next call."""

    memory: Any = None

    def dispatch(self, tokens: Tokens) -> Received:
        received = super().dispatch(tokens)
        rows = received.rows
        if rows.requires_grad:
            return received
        if self.memory is None or self.memory.shape[1] != rows.shape[1]:
            self.memory = rows.new_empty(4096, rows.shape[1])
        lent = self.memory[: len(rows)]
        return received._replace(rows=lent.copy_(rows))


@caught_by("calls_follow_each_other_in_every_mode", saying="inference_mode: results")
class NothingInInferenceMode(Transport):
    """Leaves its results at zero there."""

    def combine(self, rows: Tensor, received: Received) -> Tensor:
        made = super().combine(rows, received)
        return torch.zeros_like(made) if torch.is_inference_mode_enabled() else made


@caught_by("what_overflows_is_nan_and_told", saying="results that are not NaN")
class LeavesTokensOut(Transport):
    """Has places for the first tokens of a rank alone, and gives the others no expert."""

    lost = 0

    def dispatch(self, tokens: Tokens) -> Received:
        ids, kept = tokens.ids.clone(), self.problem.capacity or len(tokens.ids)
        ids[kept:] = -1
        self.lost = max(0, len(ids) - kept)
        return super().dispatch(tokens._replace(ids=ids))


@caught_by("what_overflows_is_nan_and_told", saying="raised nothing, though tokens are NaN")
class LosesTokensWithoutAWord(LeavesTokensOut):
    """Makes those tokens NaN, and says nothing."""

    def combine(self, rows: Tensor, received: Received) -> Tensor:
        sums = super().combine(rows, received)
        return sums.index_fill(0, torch.arange(len(sums))[len(sums) - self.lost :], torch.nan)


@caught_by("what_fits_is_right_and_no_error", saying="raised though every row had a place")
class CriesWolf(Transport):
    """Raises whatever was lost."""

    def check(self) -> None:
        """Raise."""
        msg = "capacity: expected fewer tokens"
        raise CapacityError(msg)


@caught_by("what_overflows_is_nan_and_told", saying="raised though no token is NaN")
class CriesWolfAboutFewPlaces(CriesWolf):
    """Raises though it needs no places."""


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        del ctx
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        del ctx
        return grads[0] * 2


@caught_by("gradients_flow_through_both_exchanges", saying="gradient of weights")
class WeightsLearnTwice(Transport):
    """Doubles the gradient of the weights."""

    def dispatch(self, tokens: Tokens) -> Received:
        return super().dispatch(tokens._replace(weights=_Twice.apply(tokens.weights)))


@caught_by("gradients_flow_through_both_exchanges", saying="does not require gradients")
class NothingLearns(Transport):
    """Has no gradients."""

    def combine(self, rows: Tensor, received: Received) -> Tensor:
        return super().combine(rows, received).detach()


@caught_by("gradients_flow_through_both_exchanges", saying="gradient of hidden")
class PartOfTheGradient(Transport):
    """Leaves to each rank the gradient of its own experts, where the batch is shared."""

    def dispatch(self, tokens: Tokens) -> Received:
        got = super().dispatch(tokens)
        return got._replace(rows=tokens.hidden) if self.problem.shared_batch else got


@caught_by("nothing_is_read_on_the_host", saying="", on="cuda")
class LooksAtTheIds(Transport):
    """Reads the largest id on the host."""

    def dispatch(self, tokens: Tokens) -> Received:
        tokens.ids.max().item()
        return super().dispatch(tokens)


@caught_by("a_cuda_graph_replays_with_new_operands", saying="replay", on="cuda")
class FirstIdsInTheGraph(IdsKept):
    """Lets a graph keep the ids that it was captured with."""


@caught_by("graphs_of_several_sizes_replay_in_turn", saying="replay", on="cuda")
class FirstIdsInEveryGraph(IdsKept):
    """Lets graphs keep the ids that they were captured with."""


@caught_by("two_layers_exchange_on_two_streams", saying="two streams", on="cuda")
class OneBufferForAllStreams(Transport):
    """Moves the rows of all layers through one buffer, whatever stream they are on."""

    memory: Any = None

    def dispatch(self, tokens: Tokens) -> Received:
        home = type(self)
        if home.memory is None:
            home.memory = tokens.hidden.new_empty(4096, 4096)
        lent = home.memory[: len(tokens.hidden), : tokens.hidden.shape[1]]
        torch.cuda._sleep(1_000_000)
        lent.copy_(tokens.hidden)
        torch.cuda._sleep(1_000_000)
        return super().dispatch(tokens._replace(hidden=lent))


@caught_by("a_replay_that_overflows_is_told", saying="check\\(\\) raised", on="cuda")
class CriesWolfAboutReplays(CriesWolf):
    """Raises though it needs no places."""


def _unrenumbered(_right: Any) -> Any:
    return property(lambda _self: True)


def _all_rows_are_read(right: Any) -> Any:
    return lambda self, rows: right(self, rows + 0 * rows.sum())


def _anything_is_combined(right: Any) -> Any:
    def combine(self: ExpertParallel, rows: Any) -> Tensor:
        try:
            return right(self, rows)
        except (TypeError, ValueError):
            return torch.zeros(1, 1)

    return combine


def _whatever_ranks_say(_right: Any) -> Any:
    return lambda said: None  # noqa: ARG005 -- the signature


def _no_reason_given(_right: Any) -> Any:
    return lambda text, most=0: "refused"  # noqa: ARG005 -- the signature


CHANGES = (
    Change(
        "exchange", "experts_may_be_anywhere", "plan.counts", _check.Placement, "is_even",
        _unrenumbered,
    ),
    Change(
        "exchange", "rows_that_no_expert_computed_are_not_read", "results depend", ExpertParallel,
        "combine", _all_rows_are_read,
    ),
    Change(
        "exchange", "wrong_operands_are_refused_by_name", "shows the elements",
        every_check, "refusal", elements_are_shown,
    ),
    Change(
        "exchange", "wrong_results_are_refused_by_name", "no error", ExpertParallel, "combine",
        _anything_is_combined,
    ),
    Change(
        "exchange", "ranks_that_disagree_are_told_so", "no error", _agreement, "_require_the_same",
        _whatever_ranks_say,
    ),
    Change(
        "exchange", "what_one_rank_is_refused_all_ranks_are_told", "does not say why", _agreement,
        "line", _no_reason_given,
    ),
)  # fmt: skip
