"""Logits that are DTensors: rows are routed where they are, and nothing else is.

A row's result depends on no other row, so row-sharded logits give row-sharded outputs without
communication, and replicated logits replicated ones. Other placements (the experts sharded, partial
sums) are replicated first. So are rows if some of them are padding: ``num_valid_tokens`` counts
rows of the whole tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from moe_routing import _operators
from moe_routing.kernel import Operands, RoutingOutput

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.tensor.placement_types import Placement

    from moe_routing._operators import CallConfig

ROWS = Shard(0)


def route(config: CallConfig, operands: Operands, columns: int, *, training: bool) -> RoutingOutput:
    """Route checked operands of which the logits are a DTensor.

    A plain tensor among the others counts as replicated.

    :param columns: of the outputs.
    :raises ValueError: an operand is a DTensor on another mesh, or ``out`` is given.
    """
    logits, scale, bias, token_ids, expert_table, valid, expert_map, ids, out = operands
    if not isinstance(logits, DTensor):
        msg = (
            f"logits: expected a DTensor, since another operand is one, got {type(logits).__name__}"
        )
        raise TypeError(msg)
    if out is not None:
        msg = "out: expected None with logits that are a DTensor, got tensors"
        raise ValueError(msg)
    mesh = logits.device_mesh
    rows: list[Placement] = [
        p if valid is None and p in (ROWS, Replicate()) else Replicate() for p in logits.placements
    ]
    everywhere: list[Placement] = [Replicate()] * mesh.ndim

    def local(name: str, operand: Tensor | None, placements: list[Placement]) -> Tensor | None:
        if operand is None:
            return None
        if not isinstance(operand, DTensor):
            operand = DTensor.from_local(operand, mesh, everywhere, run_check=False)
        elif operand.device_mesh != mesh:
            msg = f"{name}: expected the logits' mesh {mesh}, got {operand.device_mesh}"
            raise ValueError(msg)
        # Each rank adds up the gradient over its own rows: what is replicated has a partial sum of
        # it.
        partial = [
            Partial() if p == ROWS and q != ROWS else q
            for p, q in zip(rows, placements, strict=True)
        ]
        return operand.redistribute(placements=placements).to_local(grad_placements=partial)

    shard = Operands(
        logits.redistribute(placements=rows).to_local(grad_placements=rows),
        local("per_expert_scale", scale, everywhere),
        local("bias", bias, everywhere),
        local("token_ids", token_ids, rows),
        local("expert_table", expert_table, everywhere),
        local("num_valid_tokens", valid, everywhere) if isinstance(valid, torch.Tensor) else valid,
        local("expert_map", expert_map, everywhere),
        local("ids", ids, rows),
    )
    output = _operators.call(config, shard, training=training)
    shape = torch.Size((logits.shape[0], columns))
    weights, ids = (
        DTensor.from_local(t, mesh, rows, run_check=False, shape=shape, stride=(columns, 1))
        for t in output
    )
    return RoutingOutput(weights, ids)
