"""Losses that an unequal load of the experts makes larger, and logits that grow."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from moe_routing.balancing import _check
from moe_routing.balancing.problem import LOGSUMEXP
from moe_routing.balancing.sums import sums

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Sums(NamedTuple):
    """What a loss needs to know of ``B`` batches of tokens.

    :ivar scores: ``[B, E]``, sums over tokens of scores normalised to a sum of 1 for each token.
    :ivar counts: int64 ``[B, E]``, how often each expert was selected.
    :ivar tokens: ``[B, 1]``, or one number for all batches: how many tokens there are; 1 for none.
    """

    scores: Tensor
    counts: Tensor
    tokens: Tensor | int


def sums_of(logits: Tensor, ids: Tensor, score: str, valid: Tensor | None) -> Sums:
    """Sum over the tokens of ``logits [B, S, E]``, ``ids [B, S, K]`` and ``valid [B, S]``."""
    tokens = logits.shape[1]
    number = torch.sym_max(1, tokens) if valid is None else valid.sum(1, keepdim=True).clamp(min=1)
    return Sums(*sums((logits,), ids, valid, score), number)


def imbalance(of: Sums, counts: Tensor | None = None, times: int = 1) -> Tensor:
    """Return E * sum(f * P) of each batch, ``[B]``; 0 for a batch without tokens.

    :param counts: in place of those of ``of``, from which the shares f are taken.
    :param times: a factor of it.
    """
    counts = of.counts if counts is None else counts
    dtype, factor = of.scores.dtype, times * counts.shape[-1]
    slots = counts.sum(-1, keepdim=True, dtype=dtype).clamp(min=1)
    tokens = of.tokens.to(dtype) if isinstance(of.tokens, Tensor) else of.tokens
    # Only the last product has a gradient, so the backward is one operation. Each operation takes
    # the host longer than the device.
    return (counts / (slots * (tokens / factor)) * of.scores).sum(-1)


def load_balancing_loss(
    logits: Tensor,
    ids: Tensor,
    *,
    score: str = "softmax",
    valid: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Return the load balancing loss of Switch Transformer for a batch of tokens.

    It is ``E * sum(f * P)``: f_i is the share of all selected slots that expert i got, and P_i the
    mean over tokens of its score, where the scores of a token are normalised to a sum of 1. It is 1
    where all shares are equal, and E where one expert gets everything. Gradients flow through P.
    (Fedus, Zoph, Shazeer 2022, equations 4 to 6, with K experts a token. transformers'
    ``load_balancing_loss_func`` gives K times this number.)

    A row with K ids outside ``[0, E)`` adds no counts. Numbers that are not finite are not cleaned:
    they make the loss NaN. Only the logits are kept for the way back. Nothing is read on the host.

    :param logits: ``[..., E]``, bfloat16, float16, float32 or float64: what the router was given.
    :param ids: ``[..., K]``, int32 or int64: the logical ids that it returned.
    :param score: ``"softmax"``, ``"sigmoid"`` or ``"sqrtsoftplus"``.
    :param valid: ``[...]``, bool: which tokens count, as an attention mask says it; ``None`` for
        all.
    :param group: a process group, over whose ranks the counts are added, so that f is of the global
        batch (Qwen3) and P of this rank's tokens: the mean over ranks with equally many tokens is
        the loss of the global batch. ``None`` for this rank's counts, and for DTensors, which are
        of the global batch already.
    :returns: 0-d, float32, or float64 for logits in float64. Without tokens 0.
    :raises TypeError: an argument has the wrong type or dtype.
    :raises ValueError: an argument has the wrong value, shape or device.

    >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
    >>> load_balancing_loss(logits, torch.tensor([[0], [0]]))
    tensor(1.7616)
    >>> load_balancing_loss(logits, torch.tensor([[0], [1]]))
    tensor(1.0000)
    """
    _check.call(logits, ids, score, valid)
    _check.group(group, logits)
    experts = logits.shape[-1]
    of = sums_of(
        logits.reshape(1, -1, experts),
        ids.reshape(1, -1, ids.shape[-1]),
        score,
        None if valid is None else valid.reshape(1, -1),
    )
    counts = of.counts
    if group is not None:
        torch.distributed.all_reduce(counts, group=group)
    return imbalance(of, counts).squeeze(0)


def sequence_balancing_loss(
    logits: Tensor, ids: Tensor, *, score: str = "softmax", valid: Tensor | None = None
) -> Tensor:
    """Return the mean over sequences of each sequence's load balancing loss (DeepSeek-V3).

    As ``load_balancing_loss``, but f and P are those of one sequence. (DeepSeek-V3 technical
    report, equations 17 to 20, there with sigmoid scores.) A sequence without valid tokens counts
    as one of loss 0.

    :param logits: ``[B, S, E]``, B sequences of S tokens.
    :param ids: ``[B, S, K]``.
    :param score: as for ``load_balancing_loss``.
    :param valid: ``[B, S]``, bool.
    :returns: 0-d, float32, or float64 for logits in float64. Without sequences 0.
    :raises TypeError: an argument has the wrong type or dtype.
    :raises ValueError: an argument has the wrong value, shape or device.

    >>> logits = torch.tensor([[[2.0, 0.0]], [[0.0, 2.0]]])
    >>> ids = torch.tensor([[[0]], [[1]]])
    >>> sequence_balancing_loss(logits, ids), load_balancing_loss(logits, ids)
    (tensor(1.7616), tensor(1.0000))
    """
    _check.call(logits, ids, score, valid, sequences=True)
    total = imbalance(sums_of(logits, ids, score, valid)).sum()
    mean: Tensor = total / torch.sym_max(1, logits.shape[0])
    return mean


def z_loss(logits: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Return the router z-loss: the mean over tokens of ``log(sum(e**logits))**2``.

    (Zoph et al. 2022, ST-MoE, equation 5.) It keeps logits small. Only the logits are kept for the
    way back.

    :param logits: ``[..., E]``, bfloat16, float16, float32 or float64.
    :param valid: ``[...]``, bool: which tokens count; ``None`` for all.
    :returns: 0-d, float32, or float64 for logits in float64. Without tokens 0.
    :raises TypeError: an argument has the wrong type or dtype.
    :raises ValueError: an argument has the wrong value, shape or device.

    >>> z_loss(torch.zeros(3, 4))  # log(4)**2
    tensor(1.9218)
    """
    _check.logits(logits)
    _check.valid(valid, logits)
    rows = logits.reshape(1, -1, logits.shape[-1])
    mask = None if valid is None else valid.reshape(1, -1)
    tokens = torch.sym_max(1, rows.shape[1]) if mask is None else mask.sum().clamp(min=1)
    mean: Tensor = sums((rows,), None, mask, LOGSUMEXP)[0].sum() / tokens
    return mean
