"""``plan`` through ``torch.compile``: the sorts stay PyTorch's, the rest becomes kernels."""

from __future__ import annotations

import itertools
from types import CodeType, FunctionType
from typing import TYPE_CHECKING

import torch
from torch._dynamo.exc import TorchDynamoException

from moe_routing.formula.plan import plan
from moe_routing.python_warnings import not_raised
from moe_routing_registry.locks import ForkSafeLock

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.planning import DispatchPlan, PlanProblem
    from moe_routing_registry import DeviceInfo

_counter = itertools.count()


def build(problem: PlanProblem, device: DeviceInfo) -> CompiledPlan:
    """Compile now, so that a missing compiler is this backend's rejection."""
    place = (
        torch.device(device.type)
        if device.index is None
        else torch.device(device.type, device.index)
    )
    compiled = CompiledPlan(problem, place)
    compiled.warmup()
    return compiled


class CompiledPlan:
    """A ``PlanKernel``: one graph for all T of 2 and more, and one for T = 1."""

    def __init__(self, problem: PlanProblem, device: torch.device) -> None:
        """Bind; ``warmup`` compiles."""
        self._problem = problem
        self._device = device
        self._lock = ForkSafeLock()

        def formula(ids: Tensor, capacity: int | None, weights: Tensor | None) -> DispatchPlan:
            return plan(problem, ids, capacity, weights)

        # Dynamo keeps its graphs by code object: each problem needs its own.
        code: CodeType = formula.__code__.replace(co_name=f"plan_{next(_counter)}")
        own = FunctionType(code, formula.__globals__, code.co_name, None, formula.__closure__)
        self._compiled = torch.compile(own, fullgraph=True, dynamic=True)

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
        ids = ids.contiguous()
        weights = None if weights is None else weights.contiguous()
        with self._lock, torch.no_grad(), not_raised():
            try:
                made = self._compiled(ids, capacity, weights)
            except TorchDynamoException as error:
                cause = getattr(error, "inner_exception", error)
                said = f"{type(cause).__name__}: {cause}".strip().partition("\n")[0]
                msg = f"torch-compile cannot compile {self._problem}: {said}; use backend='eager'"
                raise RuntimeError(msg) from error
        for part, given in zip(made, out, strict=True):
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
            with self._lock, torch.no_grad(), not_raised():
                self._compiled(ids, capacity, weights)
