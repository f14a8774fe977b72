"""Compile the plain formula whole, once a problem, and be told at once where that cannot be done.

K rounds of a maximum over keys are K reductions over the same rows, which Inductor fuses into one kernel with the weights
behind them; ``torch.topk`` and ``torch.sort`` would be calls between kernels, and the former's ties are arbitrary.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

import torch

from moe_routing.formula import by_rounds, by_sort, finish, route

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from moe_routing import RoutingOutput
    from moe_routing_registry import DeviceInfo, RoutingProblem

LOGGER = logging.getLogger("moe_routing.torch_compile")
ROUNDS_UP_TO = 32
"""K up to which the rounds are unrolled; a longer graph compiles for minutes, so a stable sort takes over."""
SAMPLE_TOKENS = 64
_counter = itertools.count()


def build(problem: RoutingProblem, device: DeviceInfo) -> CompiledRouter:
    """Compile now, so that a missing compiler is this backend's rejection and never a traceback in a user's call."""
    router = CompiledRouter(
        problem, torch.device(device.type) if device.index is None else torch.device(device.type, device.index)
    )
    router.warmup()
    return router


class CompiledRouter:
    """The compiled formula of one problem; one graph for T = 1, one for every larger T, for each set of operands."""

    def __init__(self, problem: RoutingProblem, device: torch.device) -> None:
        """Bind; ``warmup`` compiles."""
        self._problem = problem
        self._device = device
        self._compiled: dict[tuple[object, ...], Callable[..., RoutingOutput]] = {}
        self._lock = threading.Lock()

    def __call__(self, logits: Tensor, *, out: RoutingOutput | None = None, **operands: Any) -> RoutingOutput:  # noqa: ANN401 -- BoundRouter's operands, handed on
        """Route; see ``BoundRouter``."""
        valid = operands.get("num_valid_tokens")
        if isinstance(valid, int):  # a value would be compiled in
            operands["num_valid_tokens"] = torch.full((1,), valid, dtype=torch.int64, device=logits.device)
        result = self._run(logits.detach(), {name: value for name, value in operands.items() if value is not None})
        if out is None:
            return result
        out.weights.copy_(result.weights)
        out.ids.copy_(result.ids)
        return out

    def warmup(self) -> None:
        """Compile the graphs of an ordinary call: many tokens, and one."""
        start = time.perf_counter()
        for num_tokens in (SAMPLE_TOKENS, 1):
            logits = torch.zeros(
                num_tokens, self._problem.num_experts, dtype=getattr(torch, self._problem.dtype), device=self._device
            )
            self._run(logits, self._sample_operands(num_tokens))
        LOGGER.info("compiled %s for %s in %.1f s", self._problem, self._device, time.perf_counter() - start)

    def _sample_operands(self, num_tokens: int) -> dict[str, Tensor]:
        spec, num_experts = self._problem.spec, self._problem.num_experts
        operands: dict[str, Tensor] = {}
        if spec.per_expert_scale:
            operands["per_expert_scale"] = torch.ones(num_experts, device=self._device)
        if spec.needs_bias:
            operands["bias"] = torch.zeros(num_experts, device=self._device)
        if spec.selection == "token_table":
            operands["token_ids"] = torch.zeros(num_tokens, dtype=torch.int64, device=self._device)
            operands["expert_table"] = torch.arange(self._problem.topk, device=self._device)[None]
        return operands

    def _run(self, logits: Tensor, operands: dict[str, Tensor]) -> RoutingOutput:
        key = (logits.stride(1) == 1, *((name, value.dtype) for name, value in operands.items()))
        compiled = self._compiled.get(key)
        with torch.no_grad():
            if compiled is not None:
                return compiled(logits, **operands)
            with self._lock:
                if key not in self._compiled:
                    self._compiled[key] = self._compile()
                if logits.shape[0] > 1:
                    torch._dynamo.mark_dynamic(logits, 0)  # noqa: SLF001 -- torch documents it under this name
                return self._compiled[key](logits, **operands)

    def _compile(self) -> Callable[..., RoutingOutput]:
        spec, topk, num_experts = self._problem.spec, self._problem.topk, self._problem.num_experts
        ids_dtype: torch.dtype = getattr(torch, self._problem.ids_dtype)
        top = by_rounds if topk <= ROUNDS_UP_TO else by_sort

        def formula(logits: Tensor, **operands: Tensor) -> RoutingOutput:
            behind = {name: operands.pop(name, None) for name in ("num_valid_tokens", "expert_map")}
            weights, ids = route(spec, topk, logits, top=top, **operands)
            return finish(spec, weights, ids, num_experts=num_experts, ids_dtype=ids_dtype, **behind)

        # Dynamo keeps its graphs, and counts its recompilations, by code object: each problem needs its own.
        code: CodeType = formula.__code__.replace(co_name=f"route_{next(_counter)}")
        own = FunctionType(code, formula.__globals__, code.co_name, None, formula.__closure__)
        return torch.compile(own, fullgraph=True)
