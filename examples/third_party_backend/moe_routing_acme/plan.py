"""The operation ``plan``: three walks over the pairs of a token and a slot.

The first decides which pairs have a place, the second counts them, the third writes them. The order
is by expert, token and slot because the third walk meets the pairs of each expert in that order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numba
import numpy as np
import torch

if TYPE_CHECKING:
    from moe_routing.planning import DispatchPlan, PlanKernel, PlanProblem
    from moe_routing_registry import DeviceInfo


def build(problem: PlanProblem, _device: DeviceInfo) -> PlanKernel:
    """Return a callable that fills a plan, for any number of tokens."""
    spacing = {"sorted": 1, "blocks": problem.block, "masked": 0}[problem.layout]

    def fill(
        ids: torch.Tensor,
        out: DispatchPlan,
        *,
        capacity: int | None = None,
        weights: torch.Tensor | None = None,
    ) -> None:
        flat = ids.reshape(-1)
        ranked = torch.arange(len(flat))
        if weights is not None:  # NaN counts as -inf; of equal weights the first are kept
            numbers = weights.reshape(-1).nan_to_num(-torch.inf, torch.inf, -torch.inf)
            ranked = torch.sort(numbers, descending=True, stable=True).indices
        nothing = torch.empty(0, dtype=torch.int32)
        dropped = _fill(
            flat.numpy(), ranked.numpy(), len(flat) if capacity is None else capacity, spacing,
            problem.layout == "sorted", out.order.view(-1).numpy(), out.inverse.view(-1).numpy(),
            out.counts.numpy(), out.offsets.numpy(),
            (nothing if out.block_experts is None else out.block_experts).numpy(),
        )  # fmt: skip
        if out.num_dropped is not None:
            out.num_dropped.fill_(dropped)

    return fill


@numba.njit(cache=True, nogil=True)
def _fill(ids, ranked, capacity, spacing, permute, order, inverse, counts, offsets, block_experts):
    """Fill a plan, and return how many pairs of experts have no place.

    :param ranked: the pairs, those first that keep their places.
    :param spacing: what offsets are multiples of, or 0 for rows of ``capacity`` places.
    :param permute: put the pairs without a place at the end of ``order``.
    """
    experts = len(counts)
    kept = np.zeros(len(ids), np.bool_)
    dropped = 0
    counts[:] = 0
    for pair in ranked:
        expert = ids[pair]
        if 0 <= expert < experts:
            if counts[expert] < capacity:
                counts[expert] += 1
                kept[pair] = True
            else:
                dropped += 1
    offsets[0] = 0
    block_experts[:] = -1
    for expert in range(experts):
        length = (counts[expert] + spacing - 1) // spacing * spacing if spacing else capacity
        offsets[expert + 1] = offsets[expert] + length
        if len(block_experts):
            block_experts[offsets[expert] // spacing : offsets[expert + 1] // spacing] = expert
    order[:] = len(ids)
    place_of = offsets.copy()
    for pair in range(len(ids)):
        expert = ids[pair] if kept[pair] else experts
        if kept[pair] or permute:
            inverse[pair] = place_of[expert]
            order[place_of[expert]] = pair
            place_of[expert] += 1
        else:
            inverse[pair] = -1
    return dropped
