"""``balance`` through ``torch.compile``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moe_routing.formula.balance import summed, summed_backward
from moe_routing_backends.torch_compile.graph import Graph, located

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.balancing.problem import BalanceProblem
    from moe_routing_registry import DeviceInfo


def build(problem: BalanceProblem, device: DeviceInfo) -> CompiledBalance:
    """Compile now, so that a missing compiler is this backend's rejection."""
    compiled = CompiledBalance(problem)
    logits = torch.zeros(
        1, 4, problem.num_experts, dtype=getattr(torch, problem.dtype), device=located(device)
    )
    ids = None
    if problem.counts == "ids":
        ids = torch.zeros(1, 4, problem.topk, dtype=torch.int32, device=logits.device)
    compiled.summed(logits, ids, None)
    return compiled


class CompiledBalance:
    """A ``BalanceKernel`` with a backward, which compiles when it is first asked for."""

    def __init__(self, problem: BalanceProblem) -> None:
        """Bind; the first calls compile."""
        score, best = problem.score, problem.topk if problem.counts == "best" else 0

        def formula(
            logits: Tensor, ids: Tensor | None, weights: Tensor | None
        ) -> tuple[Tensor, Tensor]:
            return summed(logits, ids, weights, score, best)

        def gradient(grad: Tensor, logits: Tensor, weights: Tensor | None) -> Tensor:
            return summed_backward(grad, logits, weights, score, best)

        self._graph = Graph(formula, problem)  # type: ignore[arg-type] # a function of Python
        self._backward = Graph(gradient, problem)  # type: ignore[arg-type] # likewise

    def summed(
        self, logits: Tensor, ids: Tensor | None, weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return sums and counts."""
        # One layout of inputs is one graph less to compile.
        made: tuple[Tensor, Tensor] = self._graph(logits.contiguous(), ids, weights)
        return made

    def __call__(
        self,
        logits: Tensor,
        ids: Tensor | None,
        weights: Tensor | None,
        sums: Tensor,
        counts: Tensor,
    ) -> None:
        """Fill the outputs; see ``BalanceKernel``."""
        made = self.summed(logits, ids, weights)
        sums.copy_(made[0])
        counts.copy_(made[1])

    def backward(
        self, grad: Tensor, logits: Tensor, weights: Tensor | None, grad_logits: Tensor
    ) -> None:
        """Fill the gradient; see ``BalancesBackward``."""
        grad_logits.copy_(self._backward(grad, logits.contiguous(), weights))
