"""``permute`` and ``combine`` in PyTorch operations, which read nothing on the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from moe_routing.permutation.problem import GROUP

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from moe_routing.planning.kernel import DispatchPlan

LARGEST = 448.0
"""Of float8_e4m3fn."""
LEAST = 1e-10
"""The least magnitude that a scale is for: no scale is subnormal."""
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By their size in bytes."""


def permuted(hidden: Tensor, plan: DispatchPlan) -> Tensor:
    """Return the row of its token at each place, zeros at empty ones: ``[P, H]``.

    >>> import moe_routing
    >>> plan = moe_routing.plan(torch.tensor([[1, 0], [-1, 1]]), 2)
    >>> permuted(torch.tensor([[1.0], [2.0]]), plan).flatten().tolist()
    [1.0, 1.0, 2.0, 0.0]
    """
    token, full = _tokens(plan)
    # Moved as integers: no operation of PyTorch takes every dtype.
    bits = hidden.view(_INTEGERS[min(hidden.dtype.itemsize, 8)])
    rows = bits.index_select(0, token)
    return torch.where(full[:, None], rows, 0).view(hidden.dtype)


def quantized(
    rows: Tensor, divided: Callable[[Tensor, Tensor], Tensor] = torch.div
) -> tuple[Tensor, Tensor]:
    """Return rows ``[N, H]`` as float8_e4m3fn, and float32 scales ``[N, ceil(H / 128)]``.

    ``rows`` is about the former times the latter.

    :param divided: divides float32 tensors, and rounds to the nearest.
    """
    columns = rows.shape[1]
    groups = -(-columns // GROUP)
    grouped = pad(rows.float(), (0, groups * GROUP - columns)).unflatten(1, (groups, GROUP))
    largest = grouped.abs().amax(dim=2).clamp(min=LEAST)
    # By a tensor: PyTorch divides by a number as it multiplies by the reciprocal, on a CUDA device.
    scales = divided(largest, torch.full_like(largest, LARGEST))
    values = divided(grouped, scales[:, :, None]).flatten(1)[:, :columns]
    return values.to(torch.float8_e4m3fn), scales


def combined(rows: Tensor, plan: DispatchPlan, weights: Tensor | None) -> Tensor:
    """Return for each token the weighted sum of its slots' rows ``[P, H]``, in their dtype."""
    place, has_place = _places(plan)
    T, K = place.shape
    total = torch.zeros(T, rows.shape[1], dtype=torch.float32, device=rows.device)
    for k in range(K):
        row = rows.index_select(0, place[:, k]).float()
        added = row if weights is None else row * weights[:, k : k + 1].float()
        total = total + torch.where(has_place[:, k : k + 1], added, 0.0)
    return total.to(rows.dtype)


def combined_backward(
    grad: Tensor, rows: Tensor, plan: DispatchPlan, weights: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of rows and weights; see ``CombinesBackward``."""
    token, full = _tokens(plan)
    of_rows = grad.index_select(0, token)
    of_weights = None
    if weights is not None:
        pair = torch.where(full, plan.order.reshape(-1), 0)
        of_rows = of_rows.float() * weights.reshape(-1).index_select(0, pair)[:, None].float()
        place, has_place = _places(plan)
        of_slots = [
            (rows.index_select(0, slot).float() * grad.float()).sum(dim=1)
            for slot in place.unbind(1)
        ]
        of_weights = torch.where(has_place, torch.stack(of_slots, dim=1), 0.0)
    return torch.where(full[:, None], of_rows, 0.0).to(rows.dtype), of_weights


def _tokens(plan: DispatchPlan) -> tuple[Tensor, Tensor]:
    """Return the token of each place, 0 for empty ones, and which places have a pair: ``[P]``."""
    pair = plan.order.reshape(-1)
    pairs, topk = plan.inverse.numel(), plan.inverse.shape[1]
    place = torch.arange(pair.shape[0], device=pair.device)
    full = (pair >= 0) & (pair < pairs) & (place < plan.offsets[-1])
    return torch.where(full, pair // topk, 0), full


def _places(plan: DispatchPlan) -> tuple[Tensor, Tensor]:
    """Return the place of each pair, 0 for those without, and which pairs have one: ``[T, K]``."""
    place = plan.inverse
    # The first of a plan's sizes is no end of memory where somebody else made the plan.
    has_place = (place >= 0) & (place < plan.offsets[-1]) & (place < plan.order.numel())
    return torch.where(has_place, place, 0), has_place
