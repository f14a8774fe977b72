"""Sums that balancing losses are made of, and their derivatives, in plain PyTorch operations.

Arguments are those of ``moe_routing.balancing.sums.sums``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import logsigmoid, softplus

from moe_routing.private_api import softmax_backward

if TYPE_CHECKING:
    from torch import Tensor

SOFTPLUS_IS_EXP = {torch.float32: -17.0, torch.float64: -37.0}
"""Below it log(1 + e^x) is e^x to within half a rounding step."""


def summed(
    logits: Tensor, ids: Tensor | None, weights: Tensor | None, score: str, best: int
) -> tuple[Tensor, Tensor]:
    """Return sums and counts."""
    if ids is not None:
        shares = _log_scores(_widened(logits), score).softmax(-1)
        return _blanked(shares, weights).sum(-2), _counted(ids, weights, logits.shape[-1])
    if best:
        shares = logits.softmax(-1)
        picked = shares.topk(best, -1).indices
        slots = _weighted(shares.new_ones(picked.shape, dtype=torch.float32), weights)
        counts = slots.new_zeros(logits.shape[0], logits.shape[-1])
        counts = counts.scatter_add(1, picked.flatten(1), slots.flatten(1))
        return _weighted(shares.float(), weights).sum(-2), counts
    squares = _widened(logits).logsumexp(-1, keepdim=True).square()
    sums = _blanked(squares, weights).sum(-2)
    return sums, sums.new_zeros((logits.shape[0], 0), dtype=torch.int64)


def summed_backward(
    grad: Tensor, logits: Tensor, weights: Tensor | None, score: str, best: int
) -> Tensor:
    """Return the gradient of the logits, given that of the sums."""
    of_tokens = grad.unsqueeze(-2)
    if best:
        of_shares = _weighted(of_tokens.expand(logits.shape), weights).to(logits.dtype)
        return softmax_backward(of_shares, logits.softmax(-1))
    x = _widened(logits)
    if score == "logsumexp":
        of_x = 2 * x.logsumexp(-1, keepdim=True) * x.softmax(-1) * of_tokens
    else:
        of_log = _through_softmax(of_tokens, _log_scores(x, score).softmax(-1))
        of_x = of_log * _slope_of_log_scores(x, score)
    return _blanked(of_x, weights).to(logits.dtype)


def summed_forward(
    tangent: Tensor, logits: Tensor, weights: Tensor | None, score: str, best: int
) -> Tensor:
    """Return the derivative of the sums along a tangent of the logits."""
    if best:
        of_shares = _through_softmax(tangent.float(), logits.softmax(-1).float())
        return _weighted(of_shares, weights).sum(-2)
    x, along = _widened(logits), _widened(tangent)
    if score == "logsumexp":
        of_lse = (x.softmax(-1) * along).sum(-1, keepdim=True)
        return _blanked(2 * x.logsumexp(-1, keepdim=True) * of_lse, weights).sum(-2)
    of_log = along * _slope_of_log_scores(x, score)
    return _blanked(_through_softmax(of_log, _log_scores(x, score).softmax(-1)), weights).sum(-2)


def _widened(logits: Tensor) -> Tensor:
    """Return the logits in float32, or in float64 if they are in it."""
    return logits if logits.dtype is torch.float64 else logits.float()


def _counted(ids: Tensor, weights: Tensor | None, experts: int) -> Tensor:
    ids = ids.long()
    counted = (ids >= 0) & (ids < experts)
    if weights is not None:
        counted = counted & weights.unsqueeze(-1)  # not in place: vmap may batch the mask alone
    # Where nothing is to be counted, nothing is added to the first expert.
    at = ids.masked_fill(~counted, 0).flatten(1)
    return ids.new_zeros(ids.shape[0], experts).scatter_add(1, at, counted.long().flatten(1))


def _log_scores(x: Tensor, score: str) -> Tensor:
    """Return logarithms of scores. The softmax of them is the scores divided by their sum.

    So scores may be as small as they are: their sum is never 0.
    """
    if score == "sigmoid":
        return logsigmoid(x)
    if score == "sqrtsoftplus":
        least = SOFTPLUS_IS_EXP[x.dtype]
        return torch.where(x < least, x, _softplus(x.clamp(min=least)).log()) * 0.5
    return x


def _slope_of_log_scores(x: Tensor, score: str) -> Tensor | float:
    """Return the derivative of ``_log_scores``."""
    if score == "sigmoid":
        return torch.sigmoid(-x)
    if score == "sqrtsoftplus":
        least = SOFTPLUS_IS_EXP[x.dtype]
        clamped = x.clamp(min=least)
        return torch.where(x < least, 1.0, torch.sigmoid(clamped) / _softplus(clamped)) * 0.5
    return 1.0


def _softplus(x: Tensor) -> Tensor:
    return softplus(x, threshold=40.0)  # 20, the usual one, is too low for float64


def _blanked(x: Tensor, valid: Tensor | None) -> Tensor:
    """Replace what does not count by 0, whatever it is."""
    return x if valid is None else x.masked_fill(~valid.unsqueeze(-1), 0.0)


def _weighted(x: Tensor, weights: Tensor | None) -> Tensor:
    return x if weights is None else x * weights.unsqueeze(-1)


def _through_softmax(of: Tensor, scores: Tensor) -> Tensor:
    """Return the derivative of a softmax, a symmetric matrix, times ``of``."""
    return scores * (of - (scores * of).sum(-1, keepdim=True))
