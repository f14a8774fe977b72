"""Route rows with plain PyTorch operations.

Select, weigh the K selected, then scale, append, map and mask.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch

from moe_routing.formula.select import finite, from_table, replay
from moe_routing.formula.weights import activated, score, selected_weights, sparsemixer
from moe_routing.kernel import RoutingOutput

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.formula.select import Select
    from moe_routing_registry import RoutingSpec


def route(  # noqa: PLR0913 -- Kernel's operands
    spec: RoutingSpec,
    topk: int,
    logits: Tensor,
    *,
    select: Select,
    per_expert_scale: Tensor | None = None,
    bias: Tensor | None = None,
    token_ids: Tensor | None = None,
    expert_table: Tensor | None = None,
    recorded: Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return float32 weights and int64 logical ids of the K selected experts.

    Both are whole or in columns, as ``select`` returns the ids.

    Loops rather than comprehensions, and conditions rather than calls that do nothing: eager routes
    a few tokens in the time of a few dozen Python calls, and each function here is one of them.

    The ids are -1 in rows to which a table or a record gives no experts; ``finish`` makes padding
    of them. In other rows a slot that was recorded without an expert is -1.

    :param select: how to find the best of a row; each way gives the same ids.
    :param recorded: ``ids`` of ``Kernel.__call__``.
    """
    l = finite(logits)
    replayed = None if recorded is None else replay(recorded, logits.shape[1])
    has_no_experts = None
    if spec.selection == "sparsemixer":
        weights, ids = ([part] for part in sparsemixer(spec, l, topk, replayed))
    else:
        if token_ids is not None and expert_table is not None:
            ids, has_no_experts = from_table(token_ids, expert_table, logits.shape[1])
            x = activated(spec, l)
        else:
            x = (
                l
                if spec.logit_multiplier == 1.0 and spec.logit_softcap is None
                else activated(spec, l)
            )
            t = (
                l
                if bias is None
                else finite(
                    (score(spec, x) if spec.selection == "scores_plus_bias" else x) + bias.float()
                )
            )
            judged = t if spec.group_by == "selection" else score(spec, x).float()
            ids = select(spec, t, topk, judged)
        if replayed is not None:
            ids = replayed.over(ids)
        weights = selected_weights(spec, x, ids, None if replayed is None else replayed.absent)
    if per_expert_scale is not None:
        scale = per_expert_scale.float()
        for n, i in enumerate(ids):
            weights[n] = weights[n] * scale.take(i)
    if spec.zero_experts:
        last = logits.shape[1] - spec.zero_experts
        weights = [w.masked_fill(i >= last, 0.0) for w, i in zip(weights, ids, strict=True)]
    if replayed is not None:
        weights, ids = replayed.blanked(weights, ids)
    if has_no_experts is not None:
        if replayed is not None:
            has_no_experts = has_no_experts & ~replayed.given
        ids = [ids[0].masked_fill(has_no_experts, -1)]
    return weights, ids


def finish(  # noqa: PLR0913 -- what may follow the maths
    spec: RoutingSpec,
    weights: list[Tensor],
    ids: list[Tensor],
    *,
    num_experts: int,
    ids_dtype: torch.dtype,
    num_valid_tokens: int | Tensor | None = None,
    expert_map: Tensor | None = None,
    replayed: bool = False,
) -> RoutingOutput:
    """Append shared experts, map logical to physical ids, and mask padding.

    Then give the ids their dtype, and join the columns.

    Both outputs are contiguous: ids that a sort selected are a view of all E of them.

    :param replayed: whether ids were recorded: single slots may be -1, and are no padding.
    """
    num_tokens, device = ids[0].shape[0], ids[0].device
    absent = [i < 0 for i in ids] if replayed else None
    padding = None
    if absent is not None:
        padding = torch.cat(absent, dim=-1).all(-1, keepdim=True)
    elif spec.selection == "token_table":
        padding = ids[0][:, :1] < 0
    if spec.shared_experts:
        shared = torch.arange(num_experts, num_experts + spec.shared_experts, device=device)
        ids = [*ids, shared.expand(num_tokens, -1)]
        shape = (num_tokens, spec.shared_experts)
        weights = [*weights, weights[0].new_full(shape, spec.shared_weight)]
    if expert_map is not None:
        # -1 takes the last entry, and is -1 again below.
        ids = [expert_map[i] for i in ids]
        if absent is not None:
            ids = [
                i if a is None else i.masked_fill(a, -1)
                for i, a in itertools.zip_longest(ids, absent)
            ]
    if num_valid_tokens is not None:
        if isinstance(num_valid_tokens, torch.Tensor) and num_valid_tokens.dtype is torch.bool:
            invalid = ~num_valid_tokens[:, None]
        else:
            invalid = (torch.arange(num_tokens, device=device) >= num_valid_tokens)[:, None]
        padding = invalid if padding is None else padding | invalid
    if padding is not None:
        weights = [w.masked_fill(padding, 0.0) for w in weights]
        ids = [i.masked_fill(padding, -1) for i in ids]
    if len(ids) == 1:
        return _tuple(RoutingOutput, (weights[0].contiguous(), ids[0].to(ids_dtype).contiguous()))
    return RoutingOutput(
        torch.cat(weights, dim=-1), torch.cat([i.to(ids_dtype) for i in ids], dim=-1)
    )


_tuple = tuple.__new__
"""Makes a named tuple in half the time of its own constructor, which is a Python function."""
