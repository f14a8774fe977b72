"""Sums over tokens that keep only the logits for the way back.

Autograd through the formulas would keep several tensors of the logits' size in float32. Here the
way back computes them again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import logsigmoid, softplus

if TYPE_CHECKING:
    from torch import Tensor

SCORES = ("softmax", "sigmoid", "sqrtsoftplus")
SOFTPLUS_IS_EXP = -17.0
"""Below it log(1 + e^x) is e^x to within half a rounding step of float32."""


def widened(logits: Tensor) -> Tensor:
    """Return the logits in float32, or in float64 if they are in it."""
    return logits if logits.dtype is torch.float64 else logits.float()


def score_sums(logits: Tensor, score: str, valid: Tensor | None) -> Tensor:
    """Sum scores over tokens: ``[B, S, E]`` to ``[B, E]``.

    The scores of a token are normalised to a sum of 1. ``valid [B, S]``: which tokens count.
    """
    if torch.compiler.is_compiling():  # the compiler decides what to keep
        return _score_sums(logits, score, valid)
    sums: Tensor = _ScoreSums.apply(logits, score, valid)  # type: ignore[no-untyped-call]
    return sums


def squares_of_logsumexp(logits: Tensor, valid: Tensor | None) -> Tensor:
    """Sum log(sum(e**x))**2 over tokens: ``[B, S, E]`` to ``[B]``."""
    if torch.compiler.is_compiling():  # likewise
        return _squares_of_logsumexp(logits, valid)
    sums: Tensor = _SquaresOfLogSumExp.apply(logits, valid)  # type: ignore[no-untyped-call]
    return sums


def _score_sums(logits: Tensor, score: str, valid: Tensor | None) -> Tensor:
    return _blanked(_log_scores(widened(logits), score).softmax(-1), valid).sum(-2)


def _squares_of_logsumexp(logits: Tensor, valid: Tensor | None) -> Tensor:
    return _blanked(widened(logits).logsumexp(-1, keepdim=True).square(), valid).sum((-2, -1))


def _log_scores(x: Tensor, score: str) -> Tensor:
    """Return logarithms of scores. The softmax of them is the scores divided by their sum.

    So scores may be as small as they are: their sum is never 0.
    """
    if score == "sigmoid":
        return logsigmoid(x)
    if score == "sqrtsoftplus":
        near = softplus(x.clamp(min=SOFTPLUS_IS_EXP)).log()
        return torch.where(x < SOFTPLUS_IS_EXP, x, near) * 0.5
    return x


def _slope_of_log_scores(x: Tensor, score: str) -> Tensor | float:
    """Return the derivative of ``_log_scores``."""
    if score == "sigmoid":
        return torch.sigmoid(-x)
    if score == "sqrtsoftplus":
        clamped = x.clamp(min=SOFTPLUS_IS_EXP)
        near = torch.sigmoid(clamped) / softplus(clamped)
        return torch.where(x < SOFTPLUS_IS_EXP, 1.0, near) * 0.5
    return 1.0


def _blanked(x: Tensor, valid: Tensor | None) -> Tensor:
    """Replace what does not count by 0, whatever it is."""
    return x if valid is None else x.masked_fill(~valid.reshape((*valid.shape, 1)), 0.0)


def through_softmax(of: Tensor, scores: Tensor) -> Tensor:
    """Return the derivative of a softmax, a symmetric matrix, times ``of``."""
    return scores * (of - (scores * of).sum(-1, keepdim=True))


class _ScoreSums(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, score: str, valid: Tensor | None) -> Tensor:
        return _score_sums(logits, score, valid)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str, Tensor | None], output: Tensor) -> None:  # noqa: ANN401 -- a bag by design
        logits, ctx.score, valid = inputs
        del output
        ctx.save_for_backward(logits, valid)
        ctx.save_for_forward(logits, valid)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401 -- a bag by design
        logits, valid = ctx.saved_tensors
        x, (of_sums,) = widened(logits), upstream
        of_log = through_softmax(of_sums.unsqueeze(-2), _log_scores(x, ctx.score).softmax(-1))
        gradient = _blanked(of_log * _slope_of_log_scores(x, ctx.score), valid)
        return gradient.to(logits.dtype), None, None

    @staticmethod
    def jvp(ctx: Any, of_logits: Tensor, *_constant: None) -> Tensor:  # noqa: ANN401 -- a bag by design
        logits, valid = ctx.saved_tensors
        x = widened(logits)
        of_log = widened(of_logits) * _slope_of_log_scores(x, ctx.score)
        of_scores = through_softmax(of_log, _log_scores(x, ctx.score).softmax(-1))
        return _blanked(of_scores, valid).sum(-2)


class _SquaresOfLogSumExp(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, valid: Tensor | None) -> Tensor:
        return _squares_of_logsumexp(logits, valid)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: Tensor) -> None:  # noqa: ANN401 -- a bag by design
        del output
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401 -- a bag by design
        logits, valid = ctx.saved_tensors
        x, (of_sums,) = widened(logits), upstream
        lse = x.logsumexp(-1, keepdim=True)
        gradient = 2 * lse * x.softmax(-1) * of_sums.reshape((*of_sums.shape, 1, 1))
        return _blanked(gradient, valid).to(logits.dtype), None

    @staticmethod
    def jvp(ctx: Any, of_logits: Tensor, *_constant: None) -> Tensor:  # noqa: ANN401 -- a bag by design
        logits, valid = ctx.saved_tensors
        x = widened(logits)
        of_lse = (x.softmax(-1) * widened(of_logits)).sum(-1, keepdim=True)
        return _blanked(2 * x.logsumexp(-1, keepdim=True) * of_lse, valid).sum((-2, -1))
