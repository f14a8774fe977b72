"""docs/contract.md as float64 maths, step by step, for all rows at a time.

Written from that page, and from no code.

What float32 cannot tell apart is stated here, as bounds:

- an ``x`` that went through a multiplier or a soft-cap may be off by ``X`` of itself;
- a score may be off by ``SCORE`` of itself, by what its ``x`` is off by, and by ``TINY``, or the
  root of it for a root;
- a sum of two numbers may be off by ``SUM`` of their magnitudes;
- weights are held to the contract's own ``RTOL`` and ``ATOL``, and by what ``x`` is off by.

They are several times what float32 needs: the fuzz looks for wrong formulas, the kit of the product
for lost bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing_registry import RoutingSpec

MAX = torch.finfo(torch.float32).max
X = 2e-6
SCORE = 2e-5
SUM = 2.0**-21
TINY = 2.0**-125
RTOL, ATOL = 2e-6, 1e-12
THRESHOLD = 1e-6
"""The distance from sparsemixer's threshold at which an entry may count as masked or not.

It is relative to the sum of both sides.
"""


def as_double(operand: Tensor) -> Tensor:
    """The same numbers in float64.

    8-bit formats go by way of float32, because some have no other way.
    """
    return operand if operand.dtype is torch.float64 else operand.float().double()


def widened(logits: Tensor) -> Tensor:
    """``l``: the logit in float32, NaN as -inf, clamped to float32's finite range.

    Here it is a float64.
    """
    l = logits.float().double()
    return torch.where(l.isnan(), -torch.inf, l).clamp(-MAX, MAX)


def transformed(spec: RoutingSpec, l: Tensor) -> tuple[Tensor, Tensor]:
    """``x``, after multiplier and soft-cap, and how far it may be off."""
    x = (l * spec.logit_multiplier).clamp(-MAX, MAX)
    changed = spec.logit_multiplier != 1.0
    if spec.logit_softcap is not None:
        x = spec.logit_softcap * (x / spec.logit_softcap).tanh()
        changed = True
    return x, x.abs() * X if changed else torch.zeros_like(x)


def log_score(spec: RoutingSpec, x: Tensor) -> Tensor:
    """Natural logarithm of the score: no score is too small for it."""
    if spec.score == "softmax":
        return x.log_softmax(-1)
    if spec.score == "sigmoid":
        return torch.where(x > 0, -(-x.abs()).exp().log1p(), x - (-x.abs()).exp().log1p())
    softplus = x.clamp(min=0) + (-x.abs()).exp().log1p()
    return torch.where(x < -30, x - x.exp() / 2, softplus.log()) / 2


def log_score_error(spec: RoutingSpec, x: Tensor, off: Tensor) -> Tensor:
    """The error of the logarithm of a score, given the error of ``x``.

    A score grows by at most e**d where its ``x`` grows by d.
    """
    if spec.score == "softmax":
        return off + (x.softmax(-1) * off).sum(-1, keepdim=True)
    return off


def raised(logarithm: Tensor, error: Tensor) -> Tensor:
    """How much larger the number is when its logarithm is larger by ``error``."""
    return (logarithm + error).exp() - logarithm.exp()


class Selected(NamedTuple):
    """What top-k looks at.

    :ivar by: a number for each expert, ``[T, E]``.
    :ivar off: how far a float32 evaluation may be from it; 0 where it involves no rounding.
    """

    by: Tensor
    off: Tensor


def selected_on(spec: RoutingSpec, l: Tensor, bias: Tensor | None) -> Selected:
    """The logits, or score or ``x`` plus bias: a NaN sum counts as -inf, and the sum is clamped."""
    if bias is None:
        return Selected(l, torch.zeros_like(l))
    b = as_double(bias)
    x, off = transformed(spec, l)
    if spec.selection == "scores_plus_bias":
        summand, off = _computed_score(spec, x, off)
    else:
        summand = x
    total = summand + b
    off = off + SUM * (summand.abs() + b.abs()) + TINY
    total = torch.where(total.isnan(), -torch.inf, total).clamp(-MAX, MAX)
    return Selected(
        total, torch.where(total.abs() == MAX, 0.0, off)
    )  # the clamp leaves nothing of what was rounded


def judged(spec: RoutingSpec, l: Tensor, by: Selected) -> Selected:
    """What groups are judged by: what is selected on, or the scores without a bias."""
    if spec.group_by == "selection":
        return by
    x, off = transformed(spec, l)
    return _computed_score(spec, x, off)


def _computed_score(spec: RoutingSpec, x: Tensor, off: Tensor) -> Selected:
    logarithm = log_score(spec, x)
    below_its_root = TINY**0.5 if spec.score == "sqrtsoftplus" else 0.0
    return Selected(
        logarithm.exp(),
        raised(logarithm, SCORE + log_score_error(spec, x, off)) + below_its_root + TINY,
    )


def group_scores(spec: RoutingSpec, by: Tensor) -> Tensor:
    """The sum of the best ``group_sum`` of each group, ``[T, groups]``; of all if it has fewer.

    From the best one on, clamped after each step.
    """
    groups = by.unflatten(-1, (spec.num_groups, -1)).sort(-1, descending=True).values
    total = groups[..., 0]
    for place in range(1, min(spec.group_sum, groups.shape[-1])):
        total = (total + groups[..., place]).clamp(-MAX, MAX)
    return total


def ranked(by: Tensor, count: int) -> Tensor:
    """Indices of the highest ``count``, equal ones by ascending index."""
    return by.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def select(spec: RoutingSpec, by: Tensor, topk: int, judged: Tensor) -> Tensor:
    """Ids by descending selection score, equal scores by ascending id, under the group rule.

    Not for token tables.

    :param judged: what groups are judged by.
    """
    if spec.topk_per_group:
        groups = by.unflatten(-1, (spec.num_groups, -1))
        best = ranked(groups, topk // spec.num_groups)
        first = torch.arange(spec.num_groups)[:, None] * groups.shape[-1]
        ids = (best + first).flatten(-2).sort(-1).values
        return ids.gather(-1, ranked(by.gather(-1, ids), topk))
    if spec.grouped:
        kept = ranked(group_scores(spec, judged), spec.topk_groups)
        allowed = torch.zeros(len(by), spec.num_groups, dtype=torch.bool).scatter_(
            1, kept, value=True
        )
        by = by.masked_fill(
            ~allowed.repeat_interleave(by.shape[1] // spec.num_groups, 1), -torch.inf
        )
    return ranked(by, topk)


class Scores(NamedTuple):
    """Weights before they are scaled, and by how much a float32 evaluation may differ from them."""

    exact: Tensor
    off: Tensor


class Weights(NamedTuple):
    """Weights, and what a float32 evaluation may make of them.

    :ivar off: by how much it may differ.
    :ivar anything: where it may be infinite or NaN and may be not: it rounds to 0 or to the largest
        finite number on the way.
    """

    exact: Tensor
    off: Tensor
    anything: Tensor


def weights_at(spec: RoutingSpec, l: Tensor, ids: Tensor, scale: Tensor | None) -> Weights:
    """Exact weights at these ids, scaled, 0 for zero experts and for -1; without shared slots.

    A factor that takes a weight out of float32's range makes it infinite, and the next factor
    multiplies that.
    """
    absent, ids = ids < 0, ids.clamp(min=0)
    weigh = sparsemixer if spec.selection == "sparsemixer" else scored
    w, off = weigh(spec, l, ids, absent)
    off, anything = off + ATOL, torch.zeros_like(ids, dtype=torch.bool)
    factors = [torch.full_like(w, spec.scale)] + (
        [] if scale is None else [scale.float().double()[ids]]
    )
    for factor in factors:
        anything |= factor.isinf() & (w.abs() <= off + TINY)
        w = w * factor
        anything |= (w.abs() - MAX).abs() <= MAX * RTOL
        w = torch.where(w.abs() > MAX, w.sign() * torch.inf, w)
        off = torch.where(factor == 0, 0.0, off * factor.abs())  # an infinite ``off`` too
    nothing = absent
    if spec.zero_experts:
        nothing = absent | (ids >= l.shape[1] - spec.zero_experts)
    w, off = w.masked_fill(nothing, 0.0), off.masked_fill(nothing, 0.0)
    anything &= ~nothing
    return Weights(w, w.abs() * RTOL + off + TINY, anything)


def scored(spec: RoutingSpec, l: Tensor, ids: Tensor, absent: Tensor) -> Scores:
    """Scores at the ids, divided by their sum or by what epsilon and floor make of it.

    :param absent: slots without an expert, which no sum has.
    """
    x, off = transformed(spec, l)
    logarithm = log_score(spec, x).gather(1, ids).masked_fill(absent, -torch.inf)
    flushed = torch.zeros(())
    error = log_score_error(spec, x, off).gather(1, ids)
    if not spec.renormalize:
        w = logarithm.exp()
    elif not (spec.renorm_epsilon or spec.renorm_floor):
        if spec.score == "softmax":
            # The softmax's own sum is in all of them.
            logarithm = x.gather(1, ids).masked_fill(absent, -torch.inf)
        logarithm = logarithm.log_softmax(-1)
        w = logarithm.exp()
        error = error + (w * error).sum(-1, keepdim=True)
    else:
        s = logarithm.exp()
        total = (s.sum(-1, keepdim=True) + spec.renorm_epsilon).clamp(min=spec.renorm_floor)
        w = s / total
        error = error + (w * error).sum(-1, keepdim=True)
        logarithm, flushed = logarithm - total.log(), TINY / total * (1 + w * ids.shape[1])
    return Scores(w, raised(logarithm, error) + flushed)


def sparsemixer(spec: RoutingSpec, l: Tensor, ids: Tensor, absent: Tensor) -> Scores:
    """In each round, a softmax over the experts that are left and near the round's best.

    :param absent: rounds that have no expert take none away.
    """
    x, off = transformed(spec, l)
    left = torch.ones_like(l, dtype=torch.bool)
    weights, offs = [], []
    for chosen, is_absent in zip(ids.unbind(1), absent.unbind(1), strict=True):
        best = l.masked_fill(~left, -torch.inf).amax(1, keepdim=True)
        below, limit = best - l, 2 * spec.jitter * torch.maximum(l.abs(), best)
        near = (below > 0) & ((below - limit).abs() <= THRESHOLD * (below + limit))
        kept = left & (below <= limit)
        here = chosen[:, None]
        logarithm = x.masked_fill(~kept, -torch.inf).log_softmax(1)
        error = off + (logarithm.exp() * off).sum(1, keepdim=True)
        weights.append(logarithm.exp().gather(1, here))
        # A softmax over more or fewer entries: the weight lies between the two.
        most, least = (
            x.masked_fill(~among, -torch.inf).softmax(1)
            for among in (kept & ~near, kept | (near & left))
        )
        offs.append((raised(logarithm, error) + most - least).gather(1, here))
        left = left.scatter(1, here, value=False) | (left & is_absent[:, None])
    return Scores(torch.cat(weights, 1), torch.cat(offs, 1))


def is_padding(tokens: int, experts: int, valid: int | None, given: dict[str, Tensor]) -> Tensor:
    """Rows past the valid ones, and rows whose token is outside the table.

    Rows of a token with an entry that is no expert are padding too; so are rows that a mask leaves
    out, and records with a number that is no expert. A record stands in place of the table.
    """
    padding = torch.arange(tokens) >= (tokens if valid is None else min(valid, tokens))
    if "token_ids" in given:
        token_ids, table = given["token_ids"], given["expert_table"]
        outside = (token_ids < 0) | (token_ids >= len(table))
        entries = table[token_ids.masked_fill(outside, 0).long()]
        has_none = outside | ((entries < 0) | (entries >= experts)).any(1)
        padding |= has_none & ~is_recorded(given)
    if "ids" in given:
        record = given["ids"].long()
        padding |= ((record < -1) | (record >= experts)).any(1)
    return padding | ~given["valid"] if "valid" in given else padding


def is_recorded(given: dict[str, Tensor]) -> Tensor:
    """Rows that have a record."""
    if "ids" not in given:
        return torch.zeros(len(given["logits"]), dtype=torch.bool)
    return (given["ids"].long() != -1).any(1)
