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
    logits: tuple[Tensor, ...],
    ids: Tensor | None,
    weights: Tensor | None,
    score: str,
    best: int = 0,
) -> tuple[Tensor, Tensor]:
    """Sum over the tokens of B batches.

    :param logits: ``[B, S, E]``, one for each layer whose sums are added, in their order. One step
        of autograd serves all of them: on a GPU that takes as long as the sums of a layer.
    :param ids: ``[B, S, K]``: whose experts are counted; ``None`` to count the best, or nothing.
    :param weights: ``[B, S]``: which tokens count, or with ``best`` how much they do; see
        ``BalanceKernel``.
    :param score: one of ``SCORES``, or ``LOGSUMEXP``.
    :param best: count so many best scores of each token, which are rounded to the logits' dtype.
    :returns: sums ``[B, E]``, or ``[B, 1]`` for ``LOGSUMEXP``, and counts ``[B, E]``, or ``[B,
        0]``.
    """
    if torch.compiler.is_compiling():  # the compiler decides what to keep
        return _added([summed(each, ids, weights, score, best) for each in logits])
    made: tuple[Tensor, Tensor] = _Sums.apply(ids, weights, score, best, *logits)  # type: ignore[no-untyped-call]
    return made


def _added(of_layers: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if len(of_layers) == 1:
        return of_layers[0]
    every, counts = zip(*of_layers, strict=True)
    return torch.stack(every).sum(0), torch.stack(counts).sum(0)


class _Sums(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        ids: Tensor | None, weights: Tensor | None, score: str, best: int, *logits: Tensor
    ) -> tuple[Tensor, Tensor]:
        compute = run if is_plain(ids, weights, *logits) else summed
        return _added([compute(each, ids, weights, score, best) for each in logits])

    @staticmethod
    def setup_context(
        ctx: Any,  # noqa: ANN401 -- a bag by design
        inputs: tuple[Any, ...],
        output: tuple[Tensor, Tensor],
    ) -> None:
        ids, weights, ctx.score, ctx.best, *logits = inputs
        ctx.topk = 0 if ids is None else ids.shape[-1]
        ctx.preferred = preference.get()
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(weights, *logits)
        ctx.save_for_forward(weights, *logits)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 -- a bag by design
        weights, *logits = ctx.saved_tensors
        # Where the gradient is to have gradients, the logits require them.
        plain = is_plain(upstream[0], weights, *logits)

        def gradient(each: Tensor) -> Tensor:
            given = upstream[0], each, weights, ctx.score, ctx.best
            if plain:
                return run_backward(*given, topk=ctx.topk, preferred=ctx.preferred)
            return summed_backward(*given)

        needed = ctx.needs_input_grad[_FIRST:]
        made = [gradient(each) if its else None for each, its in zip(logits, needed, strict=True)]
        return *(None,) * _FIRST, *made

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, None]:  # noqa: ANN401 -- a bag by design
        weights, *logits = ctx.saved_tensors
        made = [
            summed_forward(along, each, weights, ctx.score, ctx.best)
            for along, each in zip(tangents[_FIRST:], logits, strict=True)
            if along is not None
        ]
        return torch.stack(made).sum(0), None


_FIRST = 4
"""Inputs before the logits."""
