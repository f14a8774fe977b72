"""``plan`` through ``torch.compile``: the sorts stay PyTorch's, the rest becomes kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moe_routing.formula.plan import plan
from moe_routing_backends.torch_compile.graph import Graph, located

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.planning import DispatchPlan, PlanProblem
    from moe_routing_registry import DeviceInfo


def build(problem: PlanProblem, device: DeviceInfo) -> CompiledPlan:
    """Compile now, so that a missing compiler is this backend's rejection."""
    compiled = CompiledPlan(problem, located(device))
    compiled.warmup()
    return compiled


class CompiledPlan:
    """A ``PlanKernel``: one graph for all T of 2 and more, and one for T = 1."""

    def __init__(self, problem: PlanProblem, device: torch.device) -> None:
        """Bind; ``warmup`` compiles."""
        self._problem = problem
        self._device = device

        def formula(ids: Tensor, capacity: int | None, weights: Tensor | None) -> DispatchPlan:
            return plan(problem, ids, capacity, weights)

        self._graph = Graph(formula, problem)  # type: ignore[arg-type] # a function of Python

    def __call__(
        self,
        ids: Tensor,
        out: DispatchPlan,
        *,
        capacity: int | None = None,
        weights: Tensor | None = None,
    ) -> None:
        """Fill ``out``; see ``PlanKernel``."""
        # One layout of inputs is one graph less to compile.
        weights = None if weights is None else weights.contiguous()
        for part, given in zip(self._graph(ids.contiguous(), capacity, weights), out, strict=True):
            if part is not None and given is not None:
                given.copy_(part)

    def warmup(self) -> None:
        """Compile the graphs of an ordinary call: several tokens, and one."""
        problem = self._problem
        capacity = None if problem.drop == "nothing" else 2
        dtype: torch.dtype = getattr(torch, problem.ids_dtype)
        for tokens in (4, 1):
            ids = torch.zeros(tokens, problem.topk, dtype=dtype, device=self._device)
            weights = ids.float() if problem.drop == "least_weight" else None
            self._graph(ids, capacity, weights)
