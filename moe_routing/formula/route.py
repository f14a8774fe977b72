"""Route rows with plain PyTorch operations: select, weigh the K selected, then scale, append, map and mask."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moe_routing._backend import RoutingOutput
from moe_routing.formula.select import Top, finite, select
from moe_routing.formula.weights import activated, score, selected_weights, sparsemixer

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing_registry import RoutingSpec


def route(  # noqa: PLR0913 -- BoundRouter's operands
    spec: RoutingSpec,
    topk: int,
    logits: Tensor,
    *,
    top: Top,
    per_expert_scale: Tensor | None = None,
    bias: Tensor | None = None,
    token_ids: Tensor | None = None,
    expert_table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return float32 weights and int64 logical ids of the K selected experts, both ``[T, K]``.

    :param top: how to find the best of a row; each way gives the same ids.
    """
    l = finite(logits)
    if token_ids is not None and expert_table is not None:
        ids = expert_table[token_ids].long()
        weights = selected_weights(spec, activated(spec, l), ids)
    elif spec.selection == "sparsemixer":
        weights, ids = sparsemixer(spec, l, topk)
    else:
        x = activated(spec, l)
        ids = select(spec, _selection_scores(spec, l, x, bias), topk, top)
        weights = selected_weights(spec, x, ids)
    if per_expert_scale is not None:
        weights = weights * per_expert_scale.float().take(ids)
    if spec.zero_experts:
        weights = weights.masked_fill(ids >= logits.shape[1] - spec.zero_experts, 0.0)
    return weights, ids


def _selection_scores(spec: RoutingSpec, l: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return l
    t = score(spec, x) if spec.selection == "scores_plus_bias" else x
    return finite(t + bias.float())


def finish(  # noqa: PLR0913 -- what may follow the maths
    spec: RoutingSpec,
    weights: Tensor,
    ids: Tensor,
    *,
    num_experts: int,
    ids_dtype: torch.dtype,
    num_valid_tokens: int | Tensor | None = None,
    expert_map: Tensor | None = None,
) -> RoutingOutput:
    """Append shared experts, map logical to physical ids, mask padding, and give the ids their dtype."""
    num_tokens = ids.shape[0]
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
    return RoutingOutput(weights, ids.to(ids_dtype))
