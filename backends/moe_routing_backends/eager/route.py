"""The eager backend: select exactly, then compute the weights of the K selected experts only."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from moe_routing import RoutingOutput
from moe_routing_backends.eager.select import CHUNK, finite, select
from moe_routing_backends.eager.weights import activated, score, selected_weights, sparsemixer

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing import BoundRouter
    from moe_routing_registry import DeviceInfo, RoutingProblem, RoutingSpec


def build(problem: RoutingProblem, _device: DeviceInfo) -> BoundRouter:
    """Bind the problem; there is nothing to compile."""
    ids_dtype = {"int32": torch.int32, "int64": torch.int64}[problem.ids_dtype]
    return partial(_route, problem.spec, problem.topk, ids_dtype)


def _route(  # noqa: PLR0913 -- BoundRouter's operands behind what was bound
    spec: RoutingSpec,
    topk: int,
    ids_dtype: torch.dtype,
    logits: Tensor,
    *,
    per_expert_scale: Tensor | None = None,
    bias: Tensor | None = None,
    token_ids: Tensor | None = None,
    expert_table: Tensor | None = None,
    num_valid_tokens: int | Tensor | None = None,
    expert_map: Tensor | None = None,
    out: RoutingOutput | None = None,
) -> RoutingOutput:
    num_tokens, num_experts = logits.shape
    if token_ids is not None and expert_table is not None:
        l = finite(logits)
        ids = expert_table[token_ids].long()
        weights = selected_weights(spec, activated(spec, l), ids)
    else:
        rows = max(1, CHUNK // num_experts) if logits.device.type == "cpu" else num_tokens
        chunks = logits.split(rows) if num_tokens > rows else (logits,)
        parts = [_route_rows(spec, topk, chunk, bias) for chunk in chunks]
        weights, ids = parts[0] if len(parts) == 1 else (torch.cat([w for w, _ in parts]), torch.cat([i for _, i in parts]))
    if per_expert_scale is not None:
        weights = weights * per_expert_scale.to(torch.float32)[ids]
    if spec.zero_experts:
        weights = weights.masked_fill(ids >= num_experts - spec.zero_experts, 0.0)
    if spec.shared_experts:
        shared = torch.arange(num_experts, num_experts + spec.shared_experts, device=ids.device)
        ids = torch.cat([ids, shared.expand(num_tokens, -1)], dim=-1)
        weights = torch.cat([weights, weights.new_ones(num_tokens, spec.shared_experts)], dim=-1)
    if expert_map is not None:
        ids = expert_map[ids]
    if num_valid_tokens is not None:
        padding = (torch.arange(num_tokens, device=ids.device) >= num_valid_tokens)[:, None]
        weights = weights.masked_fill(padding, 0.0)
        ids = ids.masked_fill(padding, -1)
    if out is None:
        return RoutingOutput(weights, ids.to(ids_dtype))
    out.weights.copy_(weights)
    out.ids.copy_(ids)
    return out


def _route_rows(spec: RoutingSpec, topk: int, logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    l = finite(logits)
    if spec.selection == "sparsemixer":
        return sparsemixer(spec, l, topk)
    x = activated(spec, l)
    if spec.selection == "scores_plus_bias" and bias is not None:
        t = finite(score(spec, x).add_(bias.to(torch.float32)))
    elif spec.selection == "logits_plus_bias" and bias is not None:
        t = finite(x + bias.to(torch.float32))
    else:
        t = l
    ids = select(spec, t, topk)
    return selected_weights(spec, x, ids), ids
