"""Exact selection in plain PyTorch: the K best of each row, equal scores to the lower expert id.

``torch.topk`` breaks ties arbitrarily, so it never sees a score here. Few rows go through a stable sort. Many rows on a
CPU go through integer keys that are all different, and K rounds of a vectorised maximum: no index is carried along,
because the key holds it. At E = 128, K = 8 that takes half the time of ``torch.topk`` (``benchmarks/cpu_eager.py``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing_registry import RoutingSpec

FLOAT32_MAX = torch.finfo(torch.float32).max
_LOWEST_KEY = torch.iinfo(torch.int64).min
_SORT_UP_TO = 1 << 13
"""Elements up to which one stable sort beats building keys: its few calls cost less than the keys' many."""
_ROUNDS_UP_TO = 24
"""K up to which K rounds of a maximum beat ``torch.topk`` over the keys."""
CHUNK = 1 << 17
"""Elements of the logits that are worked on at a time: their keys (1 MiB) then stay in a core's cache."""


def finite(x: Tensor) -> Tensor:
    """Widen to float32, count NaN as -inf, and clamp to float32's finite range."""
    return torch.nan_to_num(x.to(torch.float32), nan=-FLOAT32_MAX, posinf=FLOAT32_MAX, neginf=-FLOAT32_MAX)


def select(spec: RoutingSpec, t: Tensor, topk: int) -> Tensor:
    """Select by the scores ``t [T, E]`` (float32, finite), under the spec's group rule.

    :returns: int64 ids ``[T, K]``, by descending score, equal scores by ascending id.
    """
    if spec.topk_per_group and spec.num_groups > 1:
        per_group = t.unflatten(-1, (spec.num_groups, -1))
        inside = top(per_group.flatten(0, 1), topk // spec.num_groups).view(t.shape[0], spec.num_groups, -1)
        first = torch.arange(0, t.shape[-1], per_group.shape[-1], device=t.device)
        # Group after group, and inside a group equal scores by id: a stable sort keeps both.
        ids = (inside + first[:, None]).flatten(1)
        order = t.gather(-1, ids).sort(dim=-1, descending=True, stable=True).indices
        return ids.gather(-1, order)
    if spec.grouped:
        t = _only_best_groups(spec, t)
    return top(t, topk)


def _only_best_groups(spec: RoutingSpec, t: Tensor) -> Tensor:
    per_group = t.unflatten(-1, (spec.num_groups, -1))
    if spec.group_score == "max" or per_group.shape[-1] == 1:
        score = per_group.amax(-1)
    else:
        best = per_group.topk(2, dim=-1).values
        score = finite(best[..., 0] + best[..., 1])
    kept = top(score, spec.topk_groups)
    dropped = torch.ones_like(score, dtype=torch.bool).scatter_(-1, kept, value=False)
    # Scores are finite, so -inf is below all of them, and enough experts are left: none of these is ever selected.
    return torch.flatten(per_group.masked_fill(dropped[..., None], -torch.inf), -2)


def top(t: Tensor, k: int) -> Tensor:
    """Return the ids of the k best of each row, by descending score, equal scores by ascending id."""
    if t.device.type != "cpu" or t.numel() <= _SORT_UP_TO:
        return t.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    keys = ordered_keys(t)
    if k > _ROUNDS_UP_TO:
        best = keys.topk(k, dim=-1).values
    else:
        rounds = []
        for _ in range(k):
            winner = keys.amax(-1, keepdim=True)
            rounds.append(winner)
            keys.scatter_(-1, _id_of(winner, t.shape[-1]), _LOWEST_KEY)
        best = torch.cat(rounds, dim=-1)
    return _id_of(best, t.shape[-1])


def ordered_keys(t: Tensor) -> Tensor:
    """Map scores and ids to int64 keys of the same order: higher score first, then lower id.

    A float's bits as a signed integer are in order where the float is positive; flipping all bits but the sign of the
    negative ones puts those in order too. The complement of the id in the low half breaks ties.
    """
    bits = t.add(0.0).view(torch.int32)  # -0.0 + 0.0 == +0.0, whose bits are those of no other number
    ordered = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)
    complement = torch.arange(t.shape[-1] - 1, -1, -1, device=t.device)
    return torch.add(complement, ordered, alpha=1 << 32)


def _id_of(keys: Tensor, num_experts: int) -> Tensor:
    return num_experts - 1 - (keys & 0xFFFFFFFF)
