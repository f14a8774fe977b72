"""Clause 8: gradients. Those of ``permute`` are sums that the backend's ``combine`` makes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moe_routing.formula.permutation import combined_backward
from mutants.permutation._mutant import Combines, Permutes, caught_by, overrun

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.planning import DispatchPlan

HERE = "mutants.permutation"


@caught_by(
    "the_gradient_of_a_token_is_the_sum_over_its_slots",
    saying=r"^the gradient of hidden: \d+ of",
    others={"combine": f"{HERE}.sums:LastSlotFirst"},
)
class AddsGradientsFromTheLastSlot(Permutes):
    """Adds the gradients from the last slot to the first."""


@caught_by(
    "the_gradient_of_a_token_is_the_sum_over_its_slots",
    saying=r"^the gradient of hidden: \d+ of .*, got nan$",
    others={"combine": f"{HERE}.sums:MasksByZero"},
)
class GradientsOfEmptyPlacesCount(Permutes):
    """Multiplies the gradients of empty places by 0."""


@caught_by(
    "a_gradient_may_have_any_strides",
    saying=r"^a slice: the gradient of hidden: \d+ of",
    others={"combine": f"{HERE}.memory:CombinesAsIfContiguous"},
)
class GradientsAsIfContiguous(Permutes):
    """Reads a gradient one row after another, whatever its strides."""


@caught_by(
    "gradients_have_the_same_bits_in_every_run",
    saying=r"^run \d+ of 10: other bits$",
    others={"combine": f"{HERE}.gradients:FirstCallsAreRight"},
)
class GradientsUntilTicketsRunOut(Permutes):
    """Has other gradients after some calls."""


class FirstCallsAreRight(Combines):
    """Turns two rows round after six calls."""

    calls = 0

    def write(self, made: Tensor, out: Tensor) -> None:
        self.calls += 1
        super().write(made if self.calls <= 6 else made.flip(0), out)


class WithABackward(Combines):
    """A correct backend with a backward of its own."""

    def backward(  # noqa: PLR0913, PLR0917 -- what a gradient depends on
        self,
        grad: Tensor,
        rows: Tensor,
        plan: DispatchPlan,
        weights: Tensor | None,
        grad_rows: Tensor,
        grad_weights: Tensor | None,
    ) -> None:
        """Fill the gradients."""
        made = self.differentiate(self.read_gradient(grad), rows, plan, weights)
        for one, out in zip(made, (grad_rows, grad_weights), strict=True):
            if one is not None and out is not None:
                self.write_gradient(one, out)

    def read_gradient(self, grad: Tensor) -> Tensor:
        """Return the gradient where it lies."""
        return grad

    def differentiate(
        self, grad: Tensor, rows: Tensor, plan: DispatchPlan, weights: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the gradients."""
        return combined_backward(grad, rows, plan, weights)

    def write_gradient(self, made: Tensor, out: Tensor) -> None:
        """Write a gradient."""
        out.copy_(made)


MATCH = "gradients_of_rows_and_weights_match_the_oracle"


@caught_by(MATCH, saying=r"^the gradient of weights: \d+ of")
class ProductsInTheRowsDtype(WithABackward):
    """Rounds the products of the weights' gradient to the rows' dtype."""

    def differentiate(
        self, grad: Tensor, rows: Tensor, plan: DispatchPlan, weights: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        of_rows, of_weights = super().differentiate(grad, rows, plan, weights)
        if of_weights is not None:
            of_weights = of_weights.bfloat16().float()
        return of_rows, of_weights


@caught_by(MATCH, saying=r"^the gradient of rows: \d+ of .*: expected 0.0, got ")
class LeavesGradientsOfEmptyPlaces(WithABackward):
    """Leaves the gradients of places without a pair as they were in memory."""

    def differentiate(
        self, grad: Tensor, rows: Tensor, plan: DispatchPlan, weights: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        of_rows, of_weights = super().differentiate(grad, rows, plan, weights)
        empty = plan.order.reshape(-1) >= plan.inverse.numel()
        of_rows[empty] = 7.0
        return of_rows, of_weights


@caught_by(MATCH, saying=r"^the gradient of weights: \d+ of .*: expected 0.0, got nan")
class WeightsOfUnreadRows(WithABackward):
    """Multiplies the rows that are not to be read by 0."""

    def differentiate(
        self, grad: Tensor, rows: Tensor, plan: DispatchPlan, weights: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        of_rows, of_weights = super().differentiate(grad, rows, plan, weights)
        if of_weights is not None:
            without = (plan.inverse < 0) | (plan.inverse >= plan.offsets[-1])
            of_weights = torch.where(without, rows[-1].float().sum() * 0, of_weights)
        return of_rows, of_weights


@caught_by("a_gradient_may_have_any_strides", saying=r"^a slice: the gradient of rows: \d+ of")
class ReadsTheGradientAsIfContiguous(WithABackward):
    """Reads a gradient one row after another, whatever its strides."""

    def read_gradient(self, grad: Tensor) -> Tensor:
        return grad.as_strided(grad.shape, (grad.shape[1], 1))


@caught_by("gradients_have_the_same_bits_in_every_run", saying=r"^run \d+ of 10: other bits$")
class BackwardOfTheFirstSteps(WithABackward):
    """Turns the gradient round after six calls."""

    calls = 0

    def read_gradient(self, grad: Tensor) -> Tensor:
        self.calls += 1
        return grad if self.calls <= 6 else grad.flip(0)


@caught_by(
    "a_backward_writes_its_gradients_and_nothing_else",
    saying="^bytes before or after a gradient are changed$",
)
class GradientsPastTheEnd(WithABackward):
    """Writes an element after a gradient."""

    def write_gradient(self, made: Tensor, out: Tensor) -> None:
        super().write_gradient(made, out)
        overrun(out)
