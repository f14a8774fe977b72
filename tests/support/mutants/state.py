"""What a kernel keeps between calls, and its optional methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moe_routing.kernel import Operands, RoutingOutput
from mutants._mutant import Reference, caught_by

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from moe_routing_registry import DeviceInfo, RoutingProblem


class Preparing(Reference):
    """Prepares calls; a subclass says what goes wrong in them."""

    def prepared(self, operands: Operands) -> Callable[[Operands], RoutingOutput]:
        """Return what routes later calls of the kind."""

        def route(later: Operands) -> RoutingOutput:
            return self(**self.later(operands, later)._asdict())

        return route

    def later(self, prepared: Operands, now: Operands) -> Operands:
        """Return what a later call routes."""
        del prepared
        return now


@caught_by(
    "later_calls_of_a_kind_are_right",
    "topk_softmax",
    saying="^call 2 with out: what it returns is not out",
)
class PreparedIgnoresOut(Preparing):
    """Allocates in every prepared call."""

    def later(self, prepared: Operands, now: Operands) -> Operands:
        del prepared
        return now._replace(out=None)


@caught_by(
    "later_calls_of_a_kind_are_right",
    "topk_softmax",
    saying="^call 2 without out: padding: row 13 needs ids -1",
)
class PreparedCountKept(Preparing):
    """Captures an int num_valid_tokens as a constant."""

    def later(self, prepared: Operands, now: Operands) -> Operands:
        constant = isinstance(now.num_valid_tokens, int)
        return now._replace(num_valid_tokens=prepared.num_valid_tokens) if constant else now


@caught_by(
    "later_calls_of_a_kind_are_right",
    "gemma4",
    saying=r"^call [23] without out: row \d+: weight of id",
)
class PreparedScaleKept(Preparing):
    """Captures the scale of the call that it prepared from."""

    def prepared(self, operands: Operands) -> Callable[[Operands], RoutingOutput]:
        if operands.per_expert_scale is None or isinstance(operands.num_valid_tokens, int):
            return super().prepared(operands)
        kept = operands.per_expert_scale.clone()
        return lambda later: self(**later._replace(per_expert_scale=kept)._asdict())


@caught_by(
    "later_calls_of_a_kind_are_right",
    "topk_softmax",
    saying="^call 2 without out: row .*: ids .* are not all in",
)
class PreparedForgetsTheMap(Preparing):
    """Prepares for the usual operands."""

    def later(self, prepared: Operands, now: Operands) -> Operands:
        del prepared
        return now if now.num_valid_tokens is None else now._replace(expert_map=None)


@caught_by(
    "what_is_prepared_serves_calls_with_and_without_out",
    "topk_softmax",
    saying="^prepared without out, called with: not out is",
)
class PreparedForCallsAsTheFirst(Preparing):
    """Looks for outputs where the call that it prepared from had them."""

    def later(self, prepared: Operands, now: Operands) -> Operands:
        return now._replace(out=None) if prepared.out is None else now


@caught_by(
    "operands_changed_in_place_are_read_again",
    "sigmoid_bias_topk",
    saying="^bias changed in place: row",
)
class BiasKeptAsFloat(Reference):
    """Keeps a float copy of each bias, and never asks whether the bias has changed."""

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        return super().select(logits, **operands | {"bias": _kept(operands["bias"])})


@caught_by(
    "operands_changed_in_place_are_read_again",
    "gemma4",
    saying="^per_expert_scale changed in place: row",
)
class ScaleKeptAsFloat(Reference):
    """Does the same with the scale."""

    def weigh(
        self, logits: Tensor, ids: Tensor, bias: Tensor | None, scale: Tensor | None
    ) -> Tensor:
        return super().weigh(logits, ids, bias, _kept(scale))


@caught_by(
    "operands_changed_in_place_are_read_again",
    "topk_softmax",
    saying="^expert_map changed in place: row",
)
class MapKept(Reference):
    """Does the same with the map."""

    def finish(
        self, weights: Tensor, ids: Tensor, num_experts: int, **operands: Any
    ) -> RoutingOutput:
        operands["expert_map"] = _kept(operands["expert_map"])
        return super().finish(weights, ids, num_experts, **operands)


@caught_by(
    "operands_changed_in_place_are_read_again",
    "hash_sqrtsoftplus",
    saying="^expert_table changed in place: row",
)
class TableKept(Reference):
    """Does the same with the table."""

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        return super().select(
            logits, **operands | {"expert_table": _kept(operands["expert_table"])}
        )


@caught_by(
    "operands_changed_in_place_are_read_again",
    "topk_softmax",
    saying="^num_valid_tokens changed in place: ",
)
class CountKept(Reference):
    """Reads the number of valid tokens once for each tensor that holds it."""

    def finish(
        self, weights: Tensor, ids: Tensor, num_experts: int, **operands: Any
    ) -> RoutingOutput:
        valid = operands["num_valid_tokens"]
        operands["num_valid_tokens"] = _kept(valid) if isinstance(valid, torch.Tensor) else valid
        return super().finish(weights, ids, num_experts, **operands)


def _kept(tensor: Tensor | None) -> Tensor | None:
    """Return the copy that was made when the tensor first came."""
    if tensor is None:
        return None
    if not hasattr(tensor, "kept_by_a_mutant"):
        tensor.kept_by_a_mutant = tensor.clone()  # type: ignore[attr-defined]  # a tensor takes attributes
    copy: Tensor = tensor.kept_by_a_mutant  # type: ignore[attr-defined]  # likewise
    return copy


@caught_by(
    "eight_threads_may_share_a_router", "topk_softmax", "gemma4", saying=r"^thread \d of 8: "
)
class OneScratchForAllThreads(Reference):
    """Works in a buffer of its own, which all threads share."""

    scratch: Tensor | None = None

    def read(self, logits: Tensor) -> Tensor:
        if self.scratch is None or self.scratch.shape != logits.shape:
            self.scratch = torch.empty_like(logits, memory_format=torch.contiguous_format)
        self.scratch = self.scratch.to(logits.dtype)
        return self.scratch.copy_(logits)


@caught_by(
    "a_warmed_up_router_routes_right",
    "topk_softmax",
    saying=r"^warmup\(training=False\) raises RuntimeError: no sizes",
)
class WarmupRaises(Reference):
    """Has a warm-up that nobody ever called."""

    def warmup(self) -> None:
        """Compile."""
        msg = "no sizes to compile for"
        raise RuntimeError(msg)


@caught_by("a_warmed_up_router_routes_right", "topk_softmax", saying="^T = 1 after warmup")
class WarmupLeavesItsOutput(Reference):
    """Keeps what it routed to warm up, and returns it for the next call of that shape."""

    kept: RoutingOutput | None = None

    def warmup(self) -> None:
        """Route a row of zeros."""
        self.kept = RoutingOutput(
            torch.full((1, self.topk + self.spec.shared_experts), 0.5),
            torch.arange(self.topk + self.spec.shared_experts, dtype=self.ids_dtype)[None],
        )

    def __call__(
        self, logits: Tensor, *, out: RoutingOutput | None = None, **operands: Any
    ) -> RoutingOutput:
        """Route, unless there is something left."""
        kept, self.kept = self.kept, None
        if kept is not None and len(logits) == 1 and out is None:
            return kept
        return super().__call__(logits, out=out, **operands)


@caught_by(
    "its_notes_are_lines_of_text",
    "topk_softmax",
    saying="^notes: expected a tuple of texts, got 'compiled for",
)
class NotesAreOneText(Reference):
    """Returns a text, which is a sequence of letters."""

    notes = "compiled for sm_90"


@caught_by(
    "its_notes_are_lines_of_text", "topk_softmax", saying="^notes: asking for them raises KeyError"
)
class NotesRaise(Reference):
    """Looks up what is known after a measurement only."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Say how fast it is."""
        measured: dict[str, float] = {}
        return (f"{measured['time']} us",)


@caught_by(
    "calls_may_change_between_grad_modes",
    "topk_softmax",
    saying="^in torch.no_grad after torch.inference_mode: raises RuntimeError: In",
)
class ScratchOfInferenceMode(Reference):
    """Keeps a buffer that is made in the first call, which may be one in inference mode."""

    def __init__(self, problem: RoutingProblem, device: DeviceInfo) -> None:
        super().__init__(problem, device)
        self.found: dict[tuple[int, ...], Tensor] = {}

    def weigh(
        self, logits: Tensor, ids: Tensor, bias: Tensor | None, scale: Tensor | None
    ) -> Tensor:
        weights = super().weigh(logits, ids, bias, scale)
        if len(weights) != 17:  # other rows fit into a buffer from the start
            return weights
        return (
            self.found.setdefault(tuple(weights.shape), torch.empty_like(weights))
            .copy_(weights)
            .clone()
        )


@caught_by(
    "later_training_steps_have_right_gradients",
    "gemma4",
    saying="gradient of logits at|gradient of per_expert_scale at",
)
class BackwardOfTheFirstStep(Reference):
    """Keeps what the backward of each tensor of logits needs.

    It never asks whether the logits have changed.
    """

    def backward(
        self, grad_weights: Tensor, logits: Tensor, ids: Tensor, scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of the renormalised softmax."""
        from moe_routing.formula import weights_backward

        kept = _kept(scale)
        return weights_backward(
            self.spec, grad_weights, logits.detach(), ids, None if kept is None else kept.detach()
        )
