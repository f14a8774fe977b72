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
from moe_routing.private_api import knows_its_signature
from moe_routing_registry.request import preference

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

TOGETHER = 1 << 25
"""Logits of several layers that are computed as one tensor: 64 MiB in bfloat16.

A layer alone takes a GPU less time than its launches take the host.
"""


def sums(
    logits: tuple[Tensor, ...],
    ids: Tensor | None,
    weights: Tensor | None,
    score: str,
    best: int = 0,
) -> tuple[Tensor, Tensor]:
    """Sum over the tokens of B batches.

    :param logits: ``[B, S, E]``, or all ``[S, E]`` of one batch, one for each layer whose sums are
        added, in their order. One step of autograd serves all of them, and one call of a kernel as
        many as ``TOGETHER`` holds.
    :param ids: ``[B, S, K]``: whose experts are counted; ``None`` to count the best, or nothing.
    :param weights: ``[B, S]``: which tokens count, or with ``best`` how much they do; see
        ``BalanceKernel``.
    :param score: one of ``SCORES``, or ``LOGSUMEXP``.
    :param best: count so many best scores of each token, which are rounded to the logits' dtype.
    :returns: sums ``[B, E]``, or ``[B, 1]`` for ``LOGSUMEXP``, and counts ``[B, E]``, or ``[B,
        0]``.
    """
    if torch.compiler.is_compiling():  # the compiler decides what to keep
        return _added([summed(_batches(each), ids, weights, score, best) for each in logits])
    made: tuple[Tensor, Tensor] = _Sums.apply(ids, weights, score, best, *logits)  # type: ignore[no-untyped-call]
    return made


def _added(of_layers: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if len(of_layers) == 1:
        return of_layers[0]
    every, counts = zip(*of_layers, strict=True)
    return torch.stack(every).sum(0), torch.stack(counts).sum(0)


def _over_layers(of_groups: tuple[Tensor, ...], layers: int, batches: int) -> Tensor:
    """Add up what was made of joined layers: ``[layers of the group * B, ...]`` for each group."""
    if layers == 1:
        return of_groups[0]
    joined = of_groups[0] if len(of_groups) == 1 else torch.cat(of_groups)
    return joined.view(layers, batches, joined.shape[1]).sum(0)


def _groups(logits: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the layers, neighbours that are alike together, as many as ``TOGETHER`` holds."""
    group: list[Tensor] = []
    for each in logits:
        fits = group and (len(group) + 1) * each.numel() <= TOGETHER
        if fits and (each.shape, each.dtype) == (group[0].shape, group[0].dtype):
            group.append(each)
        else:
            if group:
                yield group
            group = [each]
    if group:
        yield group


def _batches(layer: Tensor) -> Tensor:
    """Return a layer's logits as batches of tokens."""
    return layer.unsqueeze(0) if layer.dim() == _ROWS else layer


def _joined(group: list[Tensor]) -> Tensor:
    """Return layers as more batches of one tensor."""
    if len(group) == 1:
        return _batches(group[0])
    # An operation for all layers: one for each costs the host more than the kernel the device.
    return torch.stack(group) if group[0].dim() == _ROWS else torch.cat(group)


def _apart(made: Tensor, group: list[Tensor]) -> Sequence[Tensor]:
    """Return what was made of joined layers for each of them, in its shape."""
    if group[0].dim() == _ROWS:
        return made.unbind(0)
    return (made,) if len(group) == 1 else made.split([each.shape[0] for each in group])


def _again(tensor: Tensor | None, times: int) -> Tensor | None:
    """Return what is the same for all layers, for each of them."""
    if tensor is None or times == 1:
        return tensor
    return tensor.repeat(times, *(1,) * (tensor.dim() - 1))


@knows_its_signature
class _Sums(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        ids: Tensor | None, weights: Tensor | None, score: str, best: int, *logits: Tensor
    ) -> tuple[Tensor, Tensor]:
        if not is_plain(ids, weights, *logits):
            return _added([summed(_batches(each), ids, weights, score, best) for each in logits])
        made: list[tuple[Tensor, Tensor]] = []
        for group in _groups(logits):
            many = len(group)
            made.append(run(_joined(group), _again(ids, many), _again(weights, many), score, best))
        sizes = len(logits), _batches(logits[0]).shape[0]
        every, counts = zip(*made, strict=True)
        return _over_layers(every, *sizes), _over_layers(counts, *sizes)

    @staticmethod
    def setup_context(
        ctx: Any,  # noqa: ANN401 -- a bag by design
        inputs: tuple[Any, ...],
        output: tuple[Tensor, Tensor],
    ) -> None:
        ids, weights, ctx.score, ctx.best, *logits = inputs
        ctx.topk = 0 if ids is None else ids.shape[-1]
        ctx.preferred = preference.get()
        ctx.set_materialize_grads(False)  # counts have none, and zeros for them cost a launch
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(weights, *logits)
        ctx.save_for_forward(weights, *logits)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401 -- a bag by design
        weights, *logits = ctx.saved_tensors
        # Where the gradient is to have gradients, the logits require them.
        grad = upstream[0]
        needed = ctx.needs_input_grad[_FIRST:]
        if grad is None:
            return (None,) * (_FIRST + len(needed))
        given = [each for each, its in zip(logits, needed, strict=True) if its]
        made: list[Tensor] = []
        if not is_plain(grad, weights, *logits):
            for each in given:
                its = summed_backward(grad, _batches(each), weights, ctx.score, ctx.best)
                made.append(its.reshape(each.shape))
            given = []
        for group in _groups(given):
            many = len(group)
            upstream_again = grad if many == 1 else grad.repeat(many, 1)
            of_group = run_backward(
                upstream_again, _joined(group), _again(weights, many), ctx.score, ctx.best,
                topk=ctx.topk, preferred=ctx.preferred,
            )  # fmt: skip
            made += _apart(of_group, group)
        gradients = iter(made)
        return *(None,) * _FIRST, *(next(gradients) if its else None for its in needed)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, None]:  # noqa: ANN401 -- a bag by design
        weights, *logits = ctx.saved_tensors
        made = [
            summed_forward(_batches(along), _batches(each), weights, ctx.score, ctx.best)
            for along, each in zip(tangents[_FIRST:], logits, strict=True)
            if along is not None
        ]
        return torch.stack(made).sum(0), None


_ROWS = 2
"""Dimensions of the logits of one batch."""
_FIRST = 4
"""Inputs before the logits."""
