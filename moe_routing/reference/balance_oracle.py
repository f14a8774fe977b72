"""``balance`` by its definition in float64, on the CPU; written from the contract alone.

With each value comes how far a backend may be from it. A score that is divided by a sum of E terms
has a relative error of about E roundings, and a sum of S of them of S more, in any order. ``ROOM``
roundings more are for exponentials and logarithms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from moe_routing.balancing.problem import LOGSUMEXP

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.balancing.problem import BalanceProblem

ROOM = 256
TINY = 2.0**-120
"""What a backend may flush to zero, with some room."""
_ONE = torch.tensor(1.0, dtype=torch.float64)
_FAR = -30.0
"""Below it log(log(1 + e**x)) is x - e**x / 2, to within float64."""


class Near(NamedTuple):
    """The right value of each element, NaN where NaN is right, and how far from it one may be."""

    value: Tensor
    within: Tensor


class Balanced(NamedTuple):
    """What ``balance`` returns: sums, and the counts, of which there is one right value."""

    sums: Near
    counts: Tensor


def balance(
    problem: BalanceProblem, logits: Tensor, ids: Tensor | None, weights: Tensor | None
) -> Balanced:
    """Return sums and counts.

    >>> from moe_routing.balancing.problem import BalanceProblem
    >>> problem = BalanceProblem(score="sigmoid", num_experts=2, dtype="float32", topk=1)
    >>> of = balance(problem, torch.zeros(1, 2, 2), torch.tensor([[[1], [5]]]), None)
    >>> of.sums.value.tolist(), of.counts.tolist()
    ([[1.0, 1.0]], [[0, 1]])
    """
    x, weight = _given(logits, weights)
    tokens, step = x.shape[1], _step(problem)
    if problem.score == LOGSUMEXP:
        lse = x.logsumexp(-1)
        terms = lse.square()
        # An error of a logarithm is relative to the largest logit, next to which it is added.
        largest = x.abs().amax(-1) + ROOM
        errors = 2 * (lse.abs() + 1) * largest * step * 8 + terms * step * (tokens + ROOM)
        return Balanced(
            Near(_total(terms, weight), _total(errors, weight)),
            torch.zeros(len(x), 0, dtype=torch.int64),
        )
    shares = _shares(problem, x)
    if problem.counts == "best":
        dtype: torch.dtype = getattr(torch, problem.dtype)
        shares = shares.to(dtype).double()
        picked = shares.topk(problem.topk, -1).indices
        of_slot, rounding = weight, torch.finfo(dtype).eps
        tiny = torch.finfo(dtype).smallest_normal * rounding
        multiplied = shares * weight[..., None]
        sums = multiplied.sum(1)
    else:
        assert ids is not None  # noqa: S101 -- for mypy: the problem counts ids
        picked = ids.detach().cpu().long()
        of_slot, rounding, tiny = (weight != 0).double(), 0.0, TINY
        sums = torch.where(weight[..., None] != 0, shares, 0.0).sum(1)
        multiplied = sums[:, None]
    error = rounding + step * (tokens + problem.num_experts + ROOM)
    within = multiplied.abs().sum(1) * error + tokens * (TINY + tiny)
    counts = torch.zeros(len(x), problem.num_experts, dtype=torch.float64)
    for batch, token in (of_slot != 0).nonzero().tolist():
        for expert in picked[batch, token].tolist():
            if 0 <= expert < problem.num_experts:
                counts[batch, expert] += of_slot[batch, token]
    whole = counts.float() if problem.counts == "best" else counts.long()
    return Balanced(Near(sums, within), whole)


def gradient(problem: BalanceProblem, grad: Tensor, logits: Tensor, weights: Tensor | None) -> Near:
    """Return the gradient of the logits, given that of the sums."""
    x, weight = _given(logits, weights)
    step, of_sums = _step(problem), grad.detach().cpu().double()[:, None]
    rounding = torch.finfo(getattr(torch, problem.dtype)).eps
    if problem.score == LOGSUMEXP:
        lse, shares = x.logsumexp(-1, keepdim=True), x.softmax(-1)
        right = 2 * lse * shares * of_sums
        largest = x.abs().amax(-1, keepdim=True) + ROOM
        within = 2 * shares * of_sums.abs() * largest * step * 8
    else:
        shares = _shares(problem, x)
        slope = _slope(problem, x)
        factor = _ONE
        if problem.counts == "best":
            factor = weight[..., None]
        mean = (shares * of_sums * factor).sum(-1, keepdim=True)
        size = (shares * of_sums.abs() * factor.abs()).sum(-1, keepdim=True)
        right = shares * (of_sums * factor - mean) * slope
        # Scores and gradients that are rounded first, to the dtype of the logits.
        error = 4 * rounding if problem.counts == "best" else 0.0
        error = error + step * (problem.num_experts + ROOM)
        within = shares * (of_sums.abs() * factor.abs() + size) * slope.abs() * error
        if problem.counts == "best":
            within = within + 2 * torch.finfo(getattr(torch, problem.dtype)).tiny * size
    if problem.counts != "best":
        right = torch.where(weight[..., None] != 0, right, 0.0)
        within = torch.where(weight[..., None] != 0, within, 0.0)
    tiny = torch.finfo(getattr(torch, problem.dtype)).smallest_normal * rounding + TINY
    return Near(right, within + right.abs() * (rounding + 8 * step) + tiny)


def _given(logits: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    x = logits.detach().cpu().double()
    weight = torch.ones(x.shape[:2]) if weights is None else weights.detach().cpu()
    return x, weight.double()


def _step(problem: BalanceProblem) -> float:
    """Return the unit roundoff of the sums."""
    wide = problem.dtype == "float64" and problem.counts != "best"
    return 2.0**-53 if wide else 2.0**-24


def _log_score(problem: BalanceProblem, x: Tensor) -> Tensor:
    if problem.score == "softmax":
        return x
    zero = torch.zeros((), dtype=torch.float64)
    if problem.score == "sigmoid":
        return -torch.logaddexp(zero, -x)
    near = torch.logaddexp(zero, x.clamp(min=_FAR)).log()
    return torch.where(x < _FAR, x - x.clamp(max=0.0).exp() / 2, near) / 2


def _shares(problem: BalanceProblem, x: Tensor) -> Tensor:
    """Return scores divided by the sum of a token's."""
    logs = _log_score(problem, x)
    terms = (logs - logs.amax(-1, keepdim=True)).exp()
    return terms / terms.sum(-1, keepdim=True)


def _slope(problem: BalanceProblem, x: Tensor) -> Tensor:
    """Return the derivative of the logarithm of a score."""
    if problem.score == "softmax":
        return torch.ones_like(x)
    if problem.score == "sigmoid":
        return torch.sigmoid(-x)
    zero = torch.zeros((), dtype=torch.float64)
    near = x.clamp(min=_FAR)
    slope = torch.sigmoid(near) / torch.logaddexp(zero, near)
    return torch.where(x < _FAR, 1.0, slope) / 2


def _total(terms: Tensor, weight: Tensor) -> Tensor:
    return torch.where(weight != 0, terms, 0.0).sum(1, keepdim=True)
