"""The eager backend: the plain formula in PyTorch operations.

On a CPU it routes a piece of the rows at a time, with the selection that is fastest there.

At E = 128, K = 8 and T >= 256 exact ties cost nothing: K rounds of a vectorised maximum over keys
take less time than ``torch.topk``, whose ties are arbitrary (``benchmarks/cpu_eager.py``).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from moe_routing import Operands
from moe_routing.formula import by_rounds_in_place, by_sort, by_topk, finish, route, whole

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing import RoutingOutput
    from moe_routing.formula import Select, Top
    from moe_routing.kernel import Prepared
    from moe_routing_registry import DeviceInfo, RoutingProblem

SORT_UP_TO = 1 << 8
"""Elements up to which one stable sort beats building keys.

Its few calls cost less than the keys' many.
"""
TOPK_UP_TO = 3 << 12
"""Elements up to which one ``torch.topk`` over the keys beats K rounds of a maximum.

``torch.topk`` takes a row after another; a round takes the maximum over all rows at once.
"""
ROUNDS_UP_TO = 24
"""K above which the rounds never win."""
CHUNK = 1 << 17
"""Elements of the logits that are worked on at a time.

Their keys (1 MiB) then stay in a core's cache.
"""


def fastest_on_cpu(t: Tensor, k: int) -> Tensor:
    """Select in the way that is fastest for so many scores.

    See ``moe_routing.formula.select.Top``.
    """
    return _fastest_on_cpu(t.numel(), k)(t, k)


def _fastest_on_cpu(scores: int, k: int) -> Top:
    if scores <= SORT_UP_TO:
        return by_sort
    return by_topk if scores <= TOPK_UP_TO or k > ROUNDS_UP_TO else by_rounds_in_place


def build(problem: RoutingProblem, device: DeviceInfo) -> EagerKernel:
    """Make the kernel; there is nothing to compile."""
    return EagerKernel(problem, on_cpu=device.platform == "cpu")


class EagerKernel:
    """A ``Kernel`` of PyTorch operations."""

    def __init__(self, problem: RoutingProblem, *, on_cpu: bool) -> None:
        """Keep what every call needs."""
        self._spec, self._topk, self._num_experts = problem.spec, problem.topk, problem.num_experts
        self._ids_dtype: torch.dtype = getattr(torch, problem.ids_dtype)
        self._on_cpu = on_cpu
        self._select = whole(fastest_on_cpu if on_cpu else by_sort)
        self._rows_at_a_time = max(1, CHUNK // problem.num_experts) if on_cpu else None

    def __call__(self, logits: Tensor, **operands: Any) -> RoutingOutput:  # noqa: ANN401 -- Kernel's operands
        """Route ``logits [T, E]``; see ``Kernel``."""
        return self.route(Operands(logits, **operands))

    def prepared(self, operands: Operands) -> Prepared:
        """Return a function that routes calls of this one's shapes in less host time.

        It unpacks no keywords, and does not ask again which way to select is fastest.
        """
        if not self._on_cpu or self._spec.num_groups > 1:
            return self.route
        rows = min(len(operands.logits), self._rows_at_a_time or 1)
        return partial(
            self.route, select=whole(_fastest_on_cpu(rows * self._num_experts, self._topk))
        )

    def route(self, operands: Operands, *, select: Select | None = None) -> RoutingOutput:
        """Route; on a CPU a piece of the rows at a time.

        So the keys of a piece stay in a core's cache.
        """
        logits, scale, bias, token_ids, expert_table, valid, expert_map, recorded, out = operands
        spec, topk, most = self._spec, self._topk, self._rows_at_a_time
        select = select or self._select
        if most is None or len(logits) <= most or token_ids is not None:
            weights, ids = route(
                spec, topk, logits, select=select,
                per_expert_scale=scale, bias=bias, token_ids=token_ids, expert_table=expert_table,
                recorded=recorded,
            )  # fmt: skip
        else:
            pieces = logits.split(most)
            records = [None] * len(pieces) if recorded is None else recorded.split(most)
            parts = [
                route(
                    spec, topk, rows, select=select,
                    per_expert_scale=scale, bias=bias, recorded=record,
                )
                for rows, record in zip(pieces, records, strict=True)
            ]  # fmt: skip
            weights, ids = (
                [torch.cat([part for (part,) in column])] for column in zip(*parts, strict=True)
            )
        result = finish(
            spec, weights, ids, num_experts=self._num_experts, ids_dtype=self._ids_dtype,
            num_valid_tokens=valid, expert_map=expert_map, replayed=recorded is not None,
        )  # fmt: skip
        if out is None:
            return result
        out.weights.copy_(result.weights)
        out.ids.copy_(result.ids)
        return out
