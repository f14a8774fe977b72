"""The operation ``balance``: find the kernel for checked real tensors, and call it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moe_routing._dispatch import chosen, dtype_name
from moe_routing._registry import registry
from moe_routing.balancing.kernel import BalancesBackward
from moe_routing.balancing.problem import LOGSUMEXP, BalanceProblem
from moe_routing.formula.balance import summed_backward
from moe_routing.probing import probe
from moe_routing_registry import Request
from moe_routing_registry.request import preference

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.balancing.kernel import BalanceKernel
    from moe_routing.balancing.problem import Counts

_registry = registry()
_kernels: dict[tuple[object, ...], BalanceKernel] = {}
_KERNELS_KEPT = 1024
"""When there are more, remembering begins anew."""


def run(
    logits: Tensor, ids: Tensor | None, weights: Tensor | None, score: str, best: int
) -> tuple[Tensor, Tensor]:
    """Return sums and counts; of one tensor of logits; see ``BalanceKernel``."""
    sums, counts = _empty(logits, score, best)
    if not logits.numel():
        return sums.zero_(), counts.zero_()
    topk = best if ids is None else ids.shape[-1]
    kernel = _kernel(logits, score, best, topk, preference.get())
    given = None if ids is None else ids.contiguous()
    kernel(_readable(logits), given, _packed(weights), sums, counts)
    return sums, counts


def run_backward(  # noqa: PLR0913 -- what a gradient depends on
    grad: Tensor,
    logits: Tensor,
    weights: Tensor | None,
    score: str,
    best: int,
    *,
    topk: int,
    preferred: str | None,
) -> Tensor:
    """Return the gradient of the logits, given that of the sums.

    :param topk: K of the ids that were counted: the kernel is the one that made the sums.
    :param preferred: the backend that was preferred then. A way back may run in another thread.
    """
    if not logits.numel():
        return torch.zeros_like(logits)
    kernel = _kernel(logits, score, best, best or topk, preferred)
    if not isinstance(kernel, BalancesBackward):
        return summed_backward(grad, logits, weights, score, best)
    made = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    given = grad.resolve_neg().contiguous()
    kernel.backward(given, _readable(logits), _packed(weights), made)
    return made


def _kernel(
    logits: Tensor, score: str, best: int, topk: int, preferred: str | None
) -> BalanceKernel:
    asked = (
        logits.dtype, logits.device, logits.shape[-1], score, best, topk, preferred,
        _registry.generation,
    )  # fmt: skip
    kernel = _kernels.get(asked)
    if kernel is None:
        counts: Counts = "" if score == LOGSUMEXP else "best" if best else "ids"
        problem = BalanceProblem(
            score=score,  # type: ignore[arg-type] # it has been checked
            num_experts=logits.shape[-1],
            dtype=dtype_name(logits.dtype),
            counts=counts,
            topk=topk,
        )
        found: tuple[Any, Any] = chosen(problem, probe(logits.device), Request.gather(preferred))
        kernel = found[0]
        if len(_kernels) >= _KERNELS_KEPT:
            _kernels.clear()
        _kernels[asked] = kernel
    return kernel


def _empty(logits: Tensor, score: str, best: int) -> tuple[Tensor, Tensor]:
    batches, _, experts = logits.shape
    wide = logits.dtype is torch.float64 and not best
    columns = (1, 0) if score == LOGSUMEXP else (experts, experts)
    return (
        logits.new_empty(batches, columns[0], dtype=torch.float64 if wide else torch.float32),
        logits.new_empty(batches, columns[1], dtype=torch.float32 if best else torch.int64),
    )


def _readable(logits: Tensor) -> Tensor:
    """Return logits as memory that a kernel may read: not negated lazily, and of unit stride."""
    logits = logits.resolve_neg()
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def _packed(weights: Tensor | None) -> Tensor | None:
    return None if weights is None else weights.resolve_neg().contiguous()
