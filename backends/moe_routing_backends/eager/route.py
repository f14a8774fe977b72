"""The eager backend: the plain formula, on a CPU a piece of the rows at a time, with the selection that is fastest there.

At E = 128, K = 8 and T >= 256 exact ties cost nothing: K rounds of a vectorised maximum over keys take less time than
``torch.topk``, whose ties are arbitrary (``benchmarks/cpu_eager.py``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moe_routing.formula import by_rounds_in_place, by_sort, by_topk, finish, route, whole

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing import BoundRouter, RoutingOutput
    from moe_routing_registry import DeviceInfo, RoutingProblem

SORT_UP_TO = 1 << 8
"""Elements up to which one stable sort beats building keys: its few calls cost less than the keys' many."""
TOPK_UP_TO = 3 << 12
"""Elements up to which one ``torch.topk`` over the keys, a row after another, beats K rounds of a maximum over all of them."""
ROUNDS_UP_TO = 24
"""K above which the rounds never win."""
CHUNK = 1 << 17
"""Elements of the logits that are worked on at a time: their keys (1 MiB) then stay in a core's cache."""


def fastest_on_cpu(t: Tensor, k: int) -> Tensor:
    """Select in the way that is fastest for so many scores; see ``moe_routing.formula.select.Top``."""
    if t.numel() <= SORT_UP_TO:
        return by_sort(t, k)
    return by_topk(t, k) if t.numel() <= TOPK_UP_TO or k > ROUNDS_UP_TO else by_rounds_in_place(t, k)


def build(problem: RoutingProblem, device: DeviceInfo) -> BoundRouter:
    """Bind the problem; there is nothing to compile."""
    spec, topk, num_experts = problem.spec, problem.topk, problem.num_experts
    ids_dtype: torch.dtype = getattr(torch, problem.ids_dtype)
    on_cpu = device.platform == "cpu"
    select = whole(fastest_on_cpu if on_cpu else by_sort)
    rows_at_a_time = max(1, CHUNK // num_experts)

    def bound(  # noqa: PLR0913 -- BoundRouter's operands
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
        num_tokens = logits.shape[0]
        if on_cpu and num_tokens > rows_at_a_time and token_ids is None:
            parts = [
                route(spec, topk, rows, select=select, per_expert_scale=per_expert_scale, bias=bias)
                for rows in logits.split(rows_at_a_time)
            ]
            weights, ids = ([torch.cat([part for (part,) in pieces])] for pieces in zip(*parts, strict=True))
        else:
            weights, ids = route(
                spec, topk, logits, select=select,
                per_expert_scale=per_expert_scale, bias=bias, token_ids=token_ids, expert_table=expert_table,
            )  # fmt: skip
        result = finish(
            spec, weights, ids,
            num_experts=num_experts, ids_dtype=ids_dtype, num_valid_tokens=num_valid_tokens, expert_map=expert_map,
        )  # fmt: skip
        if out is None:
            return result
        out.weights.copy_(result.weights)
        out.ids.copy_(result.ids)
        return out

    return bound
