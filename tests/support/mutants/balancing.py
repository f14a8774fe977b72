"""Wrong backends of ``balance``, and changes of the product that make it wrong.

``tests/conformance/test_balance_kit.py`` holds the kit to both.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from moe_routing.balancing import sums as product
from moe_routing.conformance.balancing.sums import SIZES
from moe_routing.formula.balance import summed, summed_backward
from moe_routing_registry import RejectCode, Verdict
from mutants._change import Change
from mutants._mutant import Mutant

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from moe_routing.balancing.problem import BalanceProblem
    from moe_routing_registry import DeviceInfo

MUTANTS: list[Mutant] = []


class Balances:
    """A correct backend. Mutants change what it reads, what it makes or what it writes."""

    def __init__(self, problem: BalanceProblem, device: DeviceInfo) -> None:
        self.problem = problem
        self.best = problem.topk if problem.counts == "best" else 0
        del device

    def __call__(
        self,
        logits: Tensor,
        ids: Tensor | None,
        weights: Tensor | None,
        sums: Tensor,
        counts: Tensor,
    ) -> None:
        """Fill the outputs."""
        made = self.make(self.read(logits), ids, weights)
        self.write(made[0], sums)
        self.write(made[1], counts)

    def read(self, logits: Tensor) -> Tensor:
        """Return the logits where they lie."""
        return logits

    def make(
        self, logits: Tensor, ids: Tensor | None, weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return sums and counts."""
        return summed(logits, ids, weights, self.problem.score, self.best)

    def write(self, made: Tensor, out: Tensor) -> None:
        """Write one of them."""
        out.copy_(made)


class WithABackward(Balances):
    """A correct backend with a backward of its own."""

    def backward(
        self, grad: Tensor, logits: Tensor, weights: Tensor | None, grad_logits: Tensor
    ) -> None:
        """Fill the gradient."""
        self.write_gradient(self.gradient(grad, logits, weights), grad_logits)

    def gradient(self, grad: Tensor, logits: Tensor, weights: Tensor | None) -> Tensor:
        """Return the gradient."""
        return summed_backward(grad, logits, weights, self.problem.score, self.best)

    def write_gradient(self, made: Tensor, out: Tensor) -> None:
        """Write it."""
        out.copy_(made)


def caught_by(check: str, saying: str, **more: Any) -> Callable[[Any], Any]:
    """Enter a mutant into the table; ``more`` are fields of it."""

    def enter(factory: Any) -> Any:
        MUTANTS.append(Mutant(factory, check, saying, operation="balance", **more))
        return factory

    return enter


def _decline_float16(problem: Any, device: DeviceInfo) -> Verdict:
    del device
    half = problem.dtype == "float16"
    return Verdict.no(RejectCode.DTYPE, "knows no float16") if half else Verdict.yes()


@caught_by(
    "what_it_declines_fails",
    r"declines balance softmax E=128 K=8 float16 \(knows no float16\), but gets it right",
    supports=_decline_float16,
)
class DeclinesWhatItCan(Balances):
    """Declines float16 logits, which it sums as well as any."""


@caught_by(
    "a_declared_gap_is_real",
    "^declares a gap in dtype, but declines nothing for it$",
    gaps={"dtype": "float16 is for others"},
)
class WithAGapThatIsNone(Balances):
    """Sums float16 logits, and says that it does not."""


@caught_by("what_it_accepts_works", "accepts balance softmax E=384 .*, but its kernel raised")
class LessThanItAccepts(Balances):
    """Has no kernel for 384 experts."""

    def __init__(self, problem: BalanceProblem, device: DeviceInfo) -> None:
        super().__init__(problem, device)
        if problem.num_experts == 384:
            msg = f"no kernel for {problem}"
            raise RuntimeError(msg)


@caught_by("sums_of_every_size_are_right", r"^sums: \d+ of \d+ are wrong")
class OneBatchOfAll(Balances):
    """Adds up the tokens of all batches where there are many."""

    def make(
        self, logits: Tensor, ids: Tensor | None, weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        sums, counts = super().make(logits, ids, weights)
        return (sums.sum(0).expand_as(sums) if len(sums) > 6 else sums), counts


@caught_by("logits_of_every_dtype_and_size_are_summed", r"^sums: \d+ of \d+ are wrong")
class PlainScores(Balances):
    """Divides scores by their sum, which is 0 far below 0."""

    def make(
        self, logits: Tensor, ids: Tensor | None, weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        sums, counts = super().make(logits, ids, weights)
        if self.problem.score != "sigmoid":
            return sums, counts
        scores = logits.to(sums.dtype).sigmoid()
        shares = scores / scores.sum(-1, keepdim=True).clamp(min=1e-30)
        valid = True if weights is None else weights.unsqueeze(-1)
        return torch.where(torch.as_tensor(valid), shares, 0.0).sum(1), counts


@caught_by("drawn_calls_are_summed", r"^sums: \d+ of \d+ are wrong")
class NoneButTheKitsSizes(Balances):
    """Is right for the numbers of experts that the kit's lists have, and for no others."""

    def make(
        self, logits: Tensor, ids: Tensor | None, weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        sums, counts = super().make(logits, ids, weights)
        listed = {experts for _, _, experts, _ in SIZES}
        return (sums if logits.shape[-1] in listed else sums + 1), counts


@caught_by("ids_are_counted", r"^counts: \d+ of \d+ are wrong")
class IdsOf32Bits(Balances):
    """Cuts ids to 32 bits."""

    def make(
        self, logits: Tensor, ids: Tensor | None, weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return super().make(logits, None if ids is None else ids.int(), weights)


@caught_by("ids_are_counted", r"^counts: \d+ of \d+ are wrong")
class AnIdOnceAToken(Balances):
    """Counts an expert once for a token that has it twice."""

    def make(
        self, logits: Tensor, ids: Tensor | None, weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if ids is not None:
            earlier = torch.ones(ids.shape[-1], ids.shape[-1], device=ids.device).tril(-1).bool()
            twice = (ids.unsqueeze(-1) == ids.unsqueeze(-2)) & earlier
            ids = ids.masked_fill(twice.any(-1), -1)
        return super().make(logits, ids, weights)


@caught_by("the_best_are_counted", r"^counts: \d+ of \d+ are wrong")
class TheWorst(Balances):
    """Counts the lowest scores."""

    def make(
        self, logits: Tensor, ids: Tensor | None, weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        sums, counts = super().make(logits, ids, weights)
        return (sums, super().make(-logits, ids, weights)[1]) if self.best else (sums, counts)


@caught_by("counts_are_whole_numbers_of_any_size", "^counts: expected .*70000")
class CountsOf16Bits(Balances):
    """Counts to 65,535."""

    def write(self, made: Tensor, out: Tensor) -> None:
        out.copy_(made % 2**16 if made.dtype == torch.int64 else made)


@caught_by("tokens_that_do_not_count_add_nothing", r"^(sums|counts): \d+ of \d+ are wrong")
class MaskedByAFactor(Balances):
    """Multiplies what does not count by 0."""

    def make(
        self, logits: Tensor, ids: Tensor | None, weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        sums, counts = super().make(logits, ids, weights)
        if weights is not None and not self.best:
            sums = sums + (logits.to(sums.dtype) * ~weights.unsqueeze(-1)).sum() * 0
        return sums, counts


@caught_by("nan_reaches_every_sum_of_its_batch", "^sums: a sum of the batch with NaN is none$")
class NanIsALowLogit(Balances):
    """Counts NaN as -infinity."""

    def read(self, logits: Tensor) -> Tensor:
        return logits.masked_fill(logits.isnan(), -torch.inf)


@caught_by("minus_infinity_is_a_score_of_0", r"^sums: \d+ of \d+ are wrong")
class InfinityIsALogitOf0(Balances):
    """Counts infinity as 0."""

    def read(self, logits: Tensor) -> Tensor:
        return logits.masked_fill(logits.isinf(), 0.0)


@caught_by("every_output_is_written_and_nothing_else", "^sums: bytes before or after")
class OneElementMore(Balances):
    """Writes past the end of the sums."""

    def write(self, made: Tensor, out: Tensor) -> None:
        out.copy_(made)
        end = out.storage_offset() + out.numel()
        if out.untyped_storage().nbytes() >= (end + 1) * out.itemsize and out.numel():
            out.as_strided((1,), (1,), end).zero_()


@caught_by("logits_of_any_strides_are_read_as_they_lie", "^logits: the call has changed it$")
class WritesIntoTheLogits(Balances):
    """Takes the maximum off in place."""

    def read(self, logits: Tensor) -> Tensor:
        if 0 in logits.stride() or logits.is_contiguous():
            return logits
        before = logits.clone()
        logits.sub_(1.0)
        return before


@caught_by("a_kernel_reads_logits_at_any_stride", r"^sums: \d+ of \d+ are wrong")
class RowsWithoutSpace(Balances):
    """Reads rows as though nothing lay between them."""

    def read(self, logits: Tensor) -> Tensor:
        if 0 in logits.stride():
            return logits
        experts = logits.shape[2]
        strides = (logits.shape[1] * experts, experts, 1)
        return logits.as_strided(logits.shape, strides, logits.storage_offset())


@caught_by("the_same_call_gives_the_same_bits", "^run .* of 20: sums: other bits$")
class AnOrderThatChanges(Balances):
    """Adds the tokens in another order each time."""

    calls = 0

    def read(self, logits: Tensor) -> Tensor:
        self.calls += 1
        return logits

    def write(self, made: Tensor, out: Tensor) -> None:
        out.copy_(made * (1 + 2.0**-22 * (self.calls % 2)) if made.is_floating_point() else made)


class _Remembers(Balances):
    """Keeps what it read first, and reads it again for logits at the same place."""

    def __init__(self, problem: BalanceProblem, device: DeviceInfo) -> None:
        super().__init__(problem, device)
        self.kept: dict[int, Tensor] = {}

    def read(self, logits: Tensor) -> Tensor:
        return self.kept.setdefault(logits.data_ptr(), logits.clone())


@caught_by("operands_changed_in_place_are_read_again", "^operands changed in place: ")
class RemembersLogits(_Remembers):
    """Does not read logits again that changed in place."""


@caught_by("each_call_uses_its_own_operands_in_stream_order", r"^sums: \d+ of \d+ are wrong")
class RemembersLogitsOfAStream(_Remembers):
    """Likewise."""


@caught_by("eight_threads_may_share_a_kernel", "^thread . of 8: ")
class OneWorkspace(Balances):
    """Works in a buffer of its own, whatever the thread."""

    workspace: Any = None

    def read(self, logits: Tensor) -> Tensor:
        if self.workspace is None or self.workspace.shape != logits.shape:
            self.workspace = torch.empty_like(logits)
        self.workspace.copy_(logits)
        time.sleep(1e-3)  # so that another thread has the time to write
        return self.workspace


@caught_by("the_gradient_of_logits_matches_the_oracle", r"^the gradient: \d+ of \d+ are wrong")
class WithoutTheMean(WithABackward):
    """Goes back without what the sum of the scores does."""

    def gradient(self, grad: Tensor, logits: Tensor, weights: Tensor | None) -> Tensor:
        right = super().gradient(grad, logits, weights)
        shares = logits.double().softmax(-1)
        mean = (shares * grad.unsqueeze(1).double()).sum(-1, keepdim=True)
        return right + (shares * mean).nan_to_num(0.0).to(right.dtype)


@caught_by("the_gradient_of_logits_matches_the_oracle", r"^the gradient: \d+ of \d+ are wrong")
class GradientsOfMaskedTokens(WithABackward):
    """Gives tokens gradients that do not count."""

    def gradient(self, grad: Tensor, logits: Tensor, weights: Tensor | None) -> Tensor:
        right = super().gradient(grad, logits, weights)
        return right if weights is None else right + (weights == 0).unsqueeze(-1)


@caught_by("gradients_have_the_same_bits_in_every_run", "^run .* of 10: other bits$")
class GradientsThatChange(WithABackward):
    """Has other bits of gradients at each second call."""

    calls = 0

    def gradient(self, grad: Tensor, logits: Tensor, weights: Tensor | None) -> Tensor:
        self.calls += 1
        right = super().gradient(grad, logits, weights)
        return right * (1 + 2.0**-22) if self.calls % 3 == 0 else right


@caught_by("a_backward_writes_its_gradient_and_nothing_else", "^the gradient: bytes before or aft")
class AGradientMore(WithABackward):
    """Writes past the end of the gradient."""

    def write_gradient(self, made: Tensor, out: Tensor) -> None:
        out.copy_(made)
        end = out.storage_offset() + out.numel()
        if out.untyped_storage().nbytes() >= (end + 1) * out.itemsize:
            out.as_strided((1,), (1,), end).zero_()


@caught_by("nothing_is_read_on_the_host", "synchroniz", only_on="cuda")
class LooksAtTheLogits(Balances):
    """Asks the device whether a logit is NaN."""

    def read(self, logits: Tensor) -> Tensor:
        return logits.clone() if bool(logits.isnan().any()) else logits


@caught_by("a_cuda_graph_replays_with_new_operands", r"^(sums|counts): \d+ of", only_on="cuda")
class KeptForGraphs(Balances):
    """Keeps a copy of the first logits, and takes these while a graph is captured."""

    kept: Tensor | None = None

    def read(self, logits: Tensor) -> Tensor:
        if self.kept is None or self.kept.shape != logits.shape:
            self.kept = logits.clone()
        return self.kept if torch.cuda.is_current_stream_capturing() else logits


@caught_by("calls_on_two_streams_do_not_meet", "^on two streams at once: ", only_on="cuda")
class OneWorkspaceOfStreams(Balances):
    """Works in a buffer of its own, whatever the stream."""

    workspace: Any = None

    def read(self, logits: Tensor) -> Tensor:
        if self.workspace is None or self.workspace.shape != logits.shape:
            self.workspace = torch.empty_like(logits)
        self.workspace.copy_(logits)
        torch.cuda._sleep(1_000_000)  # so that the other stream has the time to write
        return self.workspace


@caught_by("the_logits_device_is_used", "current device was changed", only_on="two devices")
class LeavesTheDeviceCurrent(Balances):
    """Makes the logits' device the current one."""

    def read(self, logits: Tensor) -> Tensor:
        torch.cuda.set_device(logits.device)
        return logits


def _only_contiguous_ones(right: Callable[..., Any]) -> Callable[..., Any]:
    def run_backward(grad: Tensor, *rest: Any, **more: Any) -> Tensor:
        made: Tensor = right(grad * grad.is_contiguous(), *rest, **more)
        return made

    return run_backward


def _without_gradients(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: right(*arguments).detach()


def _keeps_scores(right: Callable[..., Any]) -> Callable[..., Any]:
    def apply(*operands: Any) -> Any:
        *rest, logits = operands
        return right(*rest, logits * torch.ones_like(logits))

    return apply


CHANGES = (
    Change(
        "balance", "a_gradient_of_the_sums_may_have_any_strides",
        r"^(one row|every second): the gradient: \d+ of",
        product, "run_backward", _only_contiguous_ones,
    ),
    Change(
        "balance", "gradients_have_gradients", "^the gradient does not require gradients$",
        product, "summed_backward", _without_gradients,
    ),
    Change(
        "balance", "only_the_logits_are_kept", "tensors of the logits' size are kept$",
        product._Sums, "apply", _keeps_scores,
    ),
)  # fmt: skip
