"""Sums over tokens that losses are made of: which code computes them and their derivatives.

Only the logits are kept for the way back, which computes the scores again. A plain call is the
operation ``balance``, and so is its first derivative. Traced and transformed calls, subclasses of
tensors and further derivatives are the formulas of ``moe_routing.formula.balance``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moe_routing._call_cache import is_plain
from moe_routing.balancing.call import run, run_backward
from moe_routing.formula.balance import summed, summed_backward, summed_forward
from moe_routing_registry.request import preference

if TYPE_CHECKING:
    from torch import Tensor


def sums(
    logits: Tensor, ids: Tensor | None, weights: Tensor | None, score: str, best: int = 0
) -> tuple[Tensor, Tensor]:
    """Sum over the tokens of B batches.

    :param logits: ``[B, S, E]``.
    :param ids: ``[B, S, K]``: whose experts are counted; ``None`` to count the best, or nothing.
    :param weights: ``[B, S]``: which tokens count, or with ``best`` how much they do; see
        ``BalanceKernel``.
    :param score: one of ``SCORES``, or ``LOGSUMEXP``.
    :param best: count so many best scores of each token, which are rounded to the logits' dtype.
    :returns: sums ``[B, E]``, or ``[B, 1]`` for ``LOGSUMEXP``, and counts ``[B, E]``, or ``[B,
        0]``.
    """
    if torch.compiler.is_compiling():  # the compiler decides what to keep
        return summed(logits, ids, weights, score, best)
    made: tuple[Tensor, Tensor] = _Sums.apply(logits, ids, weights, score, best)  # type: ignore[no-untyped-call]
    return made


class _Sums(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        logits: Tensor, ids: Tensor | None, weights: Tensor | None, score: str, best: int
    ) -> tuple[Tensor, Tensor]:
        compute = run if is_plain(logits, ids, weights) else summed
        return compute(logits, ids, weights, score, best)

    @staticmethod
    def setup_context(
        ctx: Any,  # noqa: ANN401 -- a bag by design
        inputs: tuple[Tensor, Tensor | None, Tensor | None, str, int],
        output: tuple[Tensor, Tensor],
    ) -> None:
        logits, ids, weights, ctx.score, ctx.best = inputs
        ctx.topk = 0 if ids is None else ids.shape[-1]
        ctx.preferred = preference.get()
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(logits, weights)
        ctx.save_for_forward(logits, weights)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 -- a bag by design
        logits, weights = ctx.saved_tensors
        given = upstream[0], logits, weights, ctx.score, ctx.best
        # Where the gradient is to have gradients, the logits require them.
        if is_plain(*given[:3]):
            gradient = run_backward(*given, topk=ctx.topk, preferred=ctx.preferred)
        else:
            gradient = summed_backward(*given)
        return gradient, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_constant: None) -> tuple[Tensor, None]:  # noqa: ANN401 -- a bag by design
        logits, weights = ctx.saved_tensors
        return summed_forward(tangent, logits, weights, ctx.score, ctx.best), None
