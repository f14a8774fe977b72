"""The logits of ``gate`` through ``torch.compile``: the product stays PyTorch's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moe_routing.formula.gate import logits
from moe_routing.gating import Projection
from moe_routing_backends.torch_compile.graph import Graph, located

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.gating import GateProblem
    from moe_routing_registry import DeviceInfo


def build(problem: GateProblem, device: DeviceInfo) -> CompiledGate:
    """Compile now, so that a missing compiler is this backend's rejection."""
    compiled = CompiledGate(problem)
    where = located(device)
    hidden_dtype: torch.dtype = getattr(torch, problem.dtype)
    weight_dtype: torch.dtype = getattr(torch, problem.weight_dtype)
    E, H = problem.num_experts, problem.hidden_size
    columns = torch.ones(H, device=where)
    for tokens in (4, 1):
        compiled.logits(
            Projection(
                torch.zeros(tokens, H, dtype=hidden_dtype, device=where),
                torch.zeros(E, H, dtype=weight_dtype, device=where),
                torch.zeros(E, device=where) if problem.router_bias else None,
                columns if problem.norm == "rms_weight" else None,
                columns if problem.input_scale else None,
                1e-6 if problem.norm else None,
            )
        )
    return compiled


class CompiledGate:
    """A ``GateKernel``, in float64 where the device has it, as eager's is."""

    def __init__(self, problem: GateProblem) -> None:
        """Bind; the first call compiles."""
        logits_dtype: torch.dtype = getattr(torch, problem.logits_dtype)

        def formula(projection: Projection) -> Tensor:
            dtype = torch.float32 if projection.hidden.device.type == "mps" else torch.float64
            return logits(projection, dtype).float().to(logits_dtype)

        self._graph = Graph(formula, problem)  # type: ignore[arg-type] # a function of Python

    def logits(self, projection: Projection) -> Tensor:
        """Return the logits."""
        # One layout of inputs is one graph less to compile.
        made: Tensor = self._graph(
            projection._replace(
                hidden=projection.hidden.contiguous(),
                router_weight=projection.router_weight.contiguous(),
            )
        )
        return made

    def __call__(self, projection: Projection, logits: Tensor) -> None:
        """Fill the logits; see ``GateKernel``."""
        logits.copy_(self.logits(projection))
