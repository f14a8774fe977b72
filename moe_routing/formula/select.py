"""Exact selection in plain PyTorch: the K best of each row, equal scores to the lower expert id.

``torch.topk`` breaks ties arbitrarily, so it never sees a score here: only a stable sort does, or
integer keys of which no two are equal, because each holds its expert's id. There are several ways
to the same ids; which is fast depends on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing_registry import RoutingSpec

FLOAT32_MAX = torch.finfo(torch.float32).max
NARROW_UP_TO = 1 << 13
"""Experts whose ids fit into the low bits that a 16-bit float leaves 0 in float32."""
_LEAST = 2.0**-149
_BELOW_ALL = -(2.0**200)
_LOWEST_KEY = torch.iinfo(torch.int64).min
_LOWEST_NARROW_KEY = torch.iinfo(torch.int32).min

Top = Callable[["Tensor", int], "Tensor"]
"""``top(t [T, E], k) -> int64 ids [T, k]``, by descending score, equal scores by ascending id."""
Select = Callable[["RoutingSpec", "Tensor", int, "Tensor"], "list[Tensor]"]
"""``select(spec, t [T, E], k, judged [T, E]) -> int64 ids``, under the spec's group rule.

``judged`` is what groups are judged by, in float32, mostly ``t`` itself.
``[T, K]`` whole, or K columns ``[T, 1]``.
"""


def finite(x: Tensor) -> Tensor:
    """Widen to float32, count NaN as -inf, and clamp to float32's finite range."""
    return torch.nan_to_num(x.float(), nan=-FLOAT32_MAX, posinf=FLOAT32_MAX, neginf=-FLOAT32_MAX)


def from_table(
    token_ids: Tensor, expert_table: Tensor, num_experts: int
) -> tuple[list[Tensor], Tensor]:
    """Look up each token's experts ``[T, K]``, and tell which tokens ``[T, 1]`` have none.

    The ids of those are valid too.

    A token has no experts where its id is outside the table, or one of its entries is outside [0,
    E). Whether any is, the host never learns.
    """
    in_table = (token_ids >= 0) & (token_ids < expert_table.shape[0])
    ids = expert_table[token_ids.masked_fill(~in_table, 0)].long()
    exist = (ids >= 0) & (ids < num_experts)
    return [ids.masked_fill(~exist, 0)], ~(in_table & exist.all(-1))[:, None]


class Replay(NamedTuple):
    """Recorded ids ``[T, K]``.

    :ivar ids: int64, 0 where there is no expert, so that they index.
    :ivar given: tells which rows ``[T, 1]`` have a record; the others are routed as usual.
    :ivar absent: tells which slots ``[T, K]`` of recorded rows have no expert.
    :ivar wrong: tells which rows ``[T, 1]`` have an id outside [-1, E); they count as padding.
    """

    ids: Tensor
    given: Tensor
    absent: Tensor
    wrong: Tensor

    def over(self, usual: list[Tensor]) -> list[Tensor]:
        """Return the recorded ids, and those selected as usual in rows without a record."""
        recorded = in_pieces(self.ids, len(usual))
        return [r.where(self.given, u) for r, u in zip(recorded, usual, strict=True)]

    def blanked(
        self, weights: list[Tensor], ids: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Give slots without an expert weight 0 and id -1, and rows of padding ids of -1."""
        absent = in_pieces(self.absent, len(ids))
        return (
            [w.masked_fill(a, 0.0) for w, a in zip(weights, absent, strict=True)],
            [i.masked_fill(a | self.wrong, -1) for i, a in zip(ids, absent, strict=True)],
        )


def replay(recorded: Tensor, num_experts: int) -> Replay:
    """Read recorded ids ``[T, K]`` of any integer dtype."""
    ids = recorded.long()
    missing = ids == -1
    wrong = ((ids < -1) | (ids >= num_experts)).any(-1, keepdim=True)
    given = ~missing.all(-1, keepdim=True)
    return Replay(ids.masked_fill(missing | wrong, 0), given, missing & given, wrong)


def in_pieces(whole: Tensor, pieces: int) -> list[Tensor]:
    """Return ``[T, K]`` in the form in which a selection's ids come: whole, or K columns."""
    return [whole] if pieces == 1 else list(whole.split(1, dim=-1))


def whole(top: Top) -> Select:
    """Select all K at once, in that way."""
    return lambda spec, t, topk, judged: [
        top(t, topk) if spec.num_groups == 1 else _select(spec, t, topk, judged, top)
    ]


def _select(spec: RoutingSpec, t: Tensor, topk: int, judged: Tensor, top: Top) -> Tensor:
    if spec.topk_per_group and spec.num_groups > 1:
        per_group = t.unflatten(-1, (spec.num_groups, -1))
        inside = top(per_group.flatten(0, 1), topk // spec.num_groups).view(
            t.shape[0], spec.num_groups, -1
        )
        first = torch.arange(0, t.shape[-1], per_group.shape[-1], device=t.device)
        # Group after group, and inside a group equal scores by id: a stable sort keeps both.
        ids = (inside + first[:, None]).flatten(1)
        order = t.gather(-1, ids).sort(dim=-1, descending=True, stable=True).indices
        return ids.gather(-1, order)
    if spec.grouped:
        t = _only_best_groups(spec, t, judged, top)
    return top(t, topk)


def _only_best_groups(spec: RoutingSpec, t: Tensor, judged: Tensor, top: Top) -> Tensor:
    score = _group_scores(judged.unflatten(-1, (spec.num_groups, -1)), spec.group_sum, top)
    kept = top(score, spec.topk_groups)
    dropped = torch.ones_like(score, dtype=torch.bool).scatter_(-1, kept, value=False)
    per_group = t.unflatten(-1, (spec.num_groups, -1))
    # Scores are finite, so -inf is below all of them, and enough experts are left: none of these is
    # ever selected.
    return torch.flatten(per_group.masked_fill(dropped[..., None], -torch.inf), -2)


def _group_scores(per_group: Tensor, group_sum: int, top: Top) -> Tensor:
    """Return the score ``[T, G]`` of each group ``[T, G, E / G]``.

    The sum goes from the best expert on, and is clamped after each step: another order would have
    other bits.
    """
    group_sum = min(group_sum, per_group.shape[-1])
    if group_sum == 1:
        return per_group.amax(-1)
    if group_sum == 2:  # noqa: PLR2004 -- DeepSeek-V3's rule, for which two maxima are faster
        best = per_group.amax(-1, keepdim=True)
        is_best = per_group == best
        next_best = per_group.masked_fill(is_best, -torch.inf).amax(-1)
        first = best.squeeze(-1)
        return finite(first + torch.where(is_best.sum(-1) > 1, first, next_best))
    groups = per_group.flatten(0, 1)
    first, *others = groups.gather(-1, top(groups, group_sum)).unbind(-1)
    for other in others:
        first = finite(first + other)
    return first.view(per_group.shape[:-1])


def by_sort(t: Tensor, k: int) -> Tensor:
    """Sort each row stably: few calls, for few rows."""
    return t.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def by_rounds(t: Tensor, k: int) -> Tensor:
    """Take the maximum of each row's keys K times.

    A vectorised reduction that carries no index along.
    """
    keys, rounds = ordered_keys(t), []
    for _ in range(k):
        winner = keys.amax(-1, keepdim=True)
        rounds.append(winner)
        keys = keys.masked_fill(keys == winner, _LOWEST_KEY)
    return _id_of(torch.cat(rounds, dim=-1), t.shape[-1])


def by_narrow_rounds(spec: RoutingSpec, t: Tensor, topk: int, judged: Tensor) -> list[Tensor]:
    """Take K maxima of int32 keys, a column each.

    For scores that bfloat16 or float16 hold exactly, and without groups.

    As float32 such a number has 13 low bits that are 0, where the complement of the id fits
    (``NARROW_UP_TO``). What ``finite`` clamped has not, and stays outside all others without them.
    """
    del judged
    if spec.num_groups > 1:
        raise NotImplementedError(spec)
    places = (1 << (t.shape[-1] - 1).bit_length()) - 1
    bits = t.add(0.0).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    # Inductor gives an index the width of its kernel's indices, int64 for large tensors, and drops
    # a cast right after it. Only a cast of what was computed from an index (the mask changes no
    # value) keeps the keys int32.
    complement = (torch.arange(t.shape[-1] - 1, -1, -1, device=t.device) & places).to(torch.int32)
    keys = (ordered & ~places) | complement
    ids = []
    for _ in range(topk):
        winner = keys.amax(-1, keepdim=True)
        ids.append(t.shape[-1] - 1 - (winner & places).long())
        keys = keys.masked_fill(keys == winner, _LOWEST_NARROW_KEY)
    return ids


def by_rounds_in_place(t: Tensor, k: int) -> Tensor:
    """Do the same, striking one key of a row out at a time.

    On the CPU faster than a pass over all of them.
    """
    keys, rounds = ordered_keys(t), []
    for _ in range(k):
        winner = keys.amax(-1, keepdim=True)
        rounds.append(winner)
        keys.scatter_(-1, _id_of(winner, t.shape[-1]), _LOWEST_KEY)
    return _id_of(torch.cat(rounds, dim=-1), t.shape[-1])


def by_topk(t: Tensor, k: int) -> Tensor:
    """Let ``torch.topk`` find the largest of float64 keys, of which no two are equal.

    For devices that have float64.

    A key is ``t + (|t| + s) c``: c counts down with the id in steps of 2**-50, so that equal scores
    move apart, up to 2**25 of them, by less than the 2**-24 that any other score is away; s is the
    least float32, for zeros. What is masked with -inf stays below all others.
    """
    keys = t.to(torch.float64).clamp_(min=_BELOW_ALL)
    place = (t.shape[-1], t.device)
    steps = _STEPS.get(place)
    if steps is None:
        steps = _steps(*place)
    return torch.addcmul(keys, keys.abs().add_(_LEAST), steps).topk(k, dim=-1).indices


_STEPS: dict[tuple[int, torch.device], Tensor] = {}


def _steps(num_experts: int, device: torch.device) -> Tensor:
    """Make the multiples of c, and keep them if they are real.

    The caller may be inside a mode that makes fake tensors.
    """
    with torch.inference_mode(mode=False):
        steps = torch.arange(num_experts - 1, -1, -1, device=device, dtype=torch.float64).mul_(
            2.0**-50
        )
    if type(steps) is torch.Tensor:
        _STEPS[num_experts, device] = steps
    return steps


def ordered_keys(t: Tensor) -> Tensor:
    """Map scores and ids to int64 keys of the same order: higher score first, then lower id.

    A float's bits as a signed integer are in order where the float is positive; flipping all bits
    but the sign of the negative ones puts those in order too. The complement of the id in the low
    half breaks ties.
    """
    # -0.0 + 0.0 == +0.0, whose bits are those of no other number.
    bits = t.add(0.0).view(torch.int32)
    ordered = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)
    complement = torch.arange(t.shape[-1] - 1, -1, -1, device=t.device)
    return torch.add(complement, ordered, alpha=1 << 32)


def _id_of(keys: Tensor, num_experts: int) -> Tensor:
    return num_experts - 1 - (keys & 0xFFFFFFFF)
