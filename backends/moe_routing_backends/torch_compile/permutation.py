"""``permute`` and ``combine`` through ``torch.compile``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moe_routing.formula.permutation import combined, combined_backward, permuted, quantized
from moe_routing.planning import DispatchPlan
from moe_routing_backends.torch_compile.graph import Graph, located

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.permutation import CombineProblem, PermuteProblem
    from moe_routing_registry import DeviceInfo

COLUMNS = 256
"""Of the rows that a graph is compiled with first: two groups that share a scale."""


def divided(number: Tensor, by: Tensor) -> Tensor:
    """Divide float32 tensors, and round to the nearest: Inductor's own division is off by bits."""
    return (number.double() / by.double()).float()


def build_permute(problem: PermuteProblem, device: DeviceInfo) -> CompiledPermute:
    """Compile now, so that a missing compiler is this backend's rejection."""
    compiled = CompiledPermute(problem)
    for tokens in (4, 1):
        plan, hidden = _sample(problem, tokens, located(device))
        compiled.permuted(hidden, plan)
    return compiled


def build_combine(problem: CombineProblem, device: DeviceInfo) -> CompiledCombine:
    """Compile now, likewise; a gradient compiles when it is first asked for."""
    compiled = CompiledCombine(problem)
    for tokens in (4, 1):
        plan, rows = _sample(problem, tokens * problem.topk, located(device))
        plan = plan._replace(inverse=plan.order.view(tokens, problem.topk))
        weights = None
        if problem.weights:
            weights = torch.ones(
                plan.inverse.shape, dtype=getattr(torch, problem.weights), device=rows.device
            )
        compiled.combined(rows, plan, weights)
    return compiled


def _sample(
    problem: PermuteProblem | CombineProblem, rows: int, device: torch.device
) -> tuple[DispatchPlan, Tensor]:
    """Return a plan of a pair for each place, and so many rows."""
    places = rows if problem.operation == "combine" else rows * problem.topk
    order = torch.arange(places, dtype=torch.int32, device=device)
    inverse = order.view(-1, problem.topk)
    if getattr(problem, "layout", "") == "masked":
        order = order[None]
    counts = torch.full((1,), places, dtype=torch.int32, device=device)
    offsets = torch.tensor([0, places], dtype=torch.int32, device=device)
    hidden = torch.zeros(rows, COLUMNS, dtype=getattr(torch, problem.dtype), device=device)
    return DispatchPlan(order, inverse, counts, offsets), hidden


class CompiledPermute:
    """A ``PermuteKernel``."""

    def __init__(self, problem: PermuteProblem) -> None:
        """Bind; the first call compiles."""
        quantizes = bool(problem.quantize)

        def formula(hidden: Tensor, plan: DispatchPlan) -> tuple[Tensor, Tensor | None]:
            if not quantizes:
                return permuted(hidden, plan), None
            values, scales = quantized(hidden, divided)
            return permuted(values, plan), permuted(scales, plan)

        self._graph = Graph(formula, problem)  # type: ignore[arg-type] # a function of Python

    def permuted(self, hidden: Tensor, plan: DispatchPlan) -> Any:  # noqa: ANN401 -- as the formula above returns
        """Return the rows and their scales."""
        # One layout of inputs is one graph less to compile.
        return self._graph(hidden.contiguous(), plan)

    def __call__(
        self, hidden: Tensor, plan: DispatchPlan, out: Tensor, *, scales: Tensor | None = None
    ) -> None:
        """Fill ``out``; see ``PermuteKernel``."""
        rows, of_rows = self.permuted(hidden, plan)
        out.copy_(rows)
        if scales is not None:
            scales.copy_(of_rows)


class CompiledCombine:
    """A ``CombineKernel`` with a backward."""

    def __init__(self, problem: CombineProblem) -> None:
        """Bind; the first calls compile."""

        def formula(rows: Tensor, plan: DispatchPlan, weights: Tensor | None) -> Tensor:
            return combined(rows, plan, weights)

        def gradients(
            grad: Tensor, rows: Tensor, plan: DispatchPlan, weights: Tensor | None
        ) -> tuple[Tensor, Tensor | None]:
            return combined_backward(grad, rows, plan, weights)

        self._graph = Graph(formula, problem)  # type: ignore[arg-type] # a function of Python
        self._backward = Graph(gradients, problem)  # type: ignore[arg-type] # likewise

    def combined(self, rows: Tensor, plan: DispatchPlan, weights: Tensor | None) -> Any:  # noqa: ANN401 -- a tensor
        """Return the sums."""
        return self._graph(rows.contiguous(), plan, weights)

    def __call__(
        self, rows: Tensor, plan: DispatchPlan, weights: Tensor | None, out: Tensor
    ) -> None:
        """Fill ``out``; see ``CombineKernel``."""
        out.copy_(self.combined(rows, plan, weights))

    def backward(  # noqa: PLR0913, PLR0917 -- what a gradient depends on
        self,
        grad: Tensor,
        rows: Tensor,
        plan: DispatchPlan,
        weights: Tensor | None,
        grad_rows: Tensor,
        grad_weights: Tensor | None,
    ) -> None:
        """Fill the gradients; see ``CombinesBackward``."""
        of_rows, of_weights = self._backward(grad.contiguous(), rows.contiguous(), plan, weights)
        grad_rows.copy_(of_rows)
        if grad_weights is not None:
            grad_weights.copy_(of_weights)
