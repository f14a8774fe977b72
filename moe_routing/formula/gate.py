"""The router's linear layer and what stands in front of it, in PyTorch operations."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor

    from moe_routing.gating.kernel import Projection


def in_full(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which ``torch.autocast`` does not make products of shorter numbers.

    >>> with torch.autocast("cpu", torch.bfloat16), in_full(torch.device("cpu")):
    ...     (torch.ones(1, 2) @ torch.ones(2, 1)).dtype
    torch.float32
    """
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def logits(projection: Projection, dtype: torch.dtype) -> Tensor:
    """Return the logits ``[T, E]``, computed in ``dtype``.

    >>> from moe_routing.gating import Projection
    >>> hidden, weight = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    >>> logits(Projection(hidden, weight, multiplier=2.0), torch.float64).tolist()
    [[6.0, 14.0]]
    """
    bias = projection.router_bias
    return torch.nn.functional.linear(
        router_inputs(projection, mean_square(projection, dtype)),
        projection.router_weight.to(dtype),
        None if bias is None else bias.to(dtype),
    )


def mean_square(projection: Projection, dtype: torch.dtype) -> Tensor:
    """Return the mean of the squares of each row, ``[T, 1]``: 0 where there is no norm."""
    hidden = projection.hidden.to(dtype)
    if projection.eps is None:
        return hidden.new_zeros(hidden.shape[0], 1)
    return hidden.square().mean(dim=1, keepdim=True)


def router_inputs(projection: Projection, squares: Tensor) -> Tensor:
    """Return what the linear layer multiplies, ``[T, H]``, in the dtype of ``squares``.

    :param squares: the means that ``mean_square`` returns.
    """
    inputs = projection.hidden.to(squares.dtype)
    if projection.eps is not None:
        inputs = inputs * (squares + projection.eps).sqrt().reciprocal()
    for factor in (projection.norm_weight, projection.input_scale):
        if factor is not None:
            inputs = inputs * factor.to(squares.dtype)
    return inputs if projection.multiplier == 1.0 else inputs * projection.multiplier


class Gradients(NamedTuple):
    """Gradients of the tensors of a projection, in their dtypes."""

    hidden: Tensor
    router_weight: Tensor
    router_bias: Tensor | None
    norm_weight: Tensor | None
    input_scale: Tensor | None


def logits_backward(projection: Projection, grad: Tensor) -> Gradients:
    """Return the gradients of the projection, given that of the logits, in float32.

    With r the factor of the norm and a the product of all factors of a column, the inputs are ``x *
    r * a``. Only operations that PyTorch can differentiate.

    :param grad: ``[T, E]``. A row of zeros, of padding for example, adds nothing, whatever its
        hidden states are: 0 times NaN is NaN, so what is not finite in such a row becomes 0.
    """
    hidden, weight, bias, norm_weight, input_scale, eps, multiplier = projection
    grad = grad.float()
    counts = (grad != 0).any(dim=1, keepdim=True)
    x = torch.where(counts | hidden.isfinite(), hidden.float(), 0.0)
    factors = [t.float() for t in (norm_weight, input_scale) if t is not None]
    a = x.new_full((), multiplier)
    for factor in factors:
        a = a * factor
    normed = x
    if eps is not None:
        r = (x.square().mean(dim=1, keepdim=True) + eps).rsqrt()
        normed = x * r
    inputs = normed * a
    inputs = torch.where(counts | inputs.isfinite(), inputs, 0.0)
    of_inputs = grad @ weight.float()
    of_normed = of_inputs * a
    of_hidden = of_normed
    if eps is not None:
        along = (of_normed * normed).mean(dim=1, keepdim=True)
        of_hidden = (of_normed - normed * along) * r
    of_columns = (of_inputs * normed).sum(dim=0) * multiplier
    return Gradients(
        of_hidden.to(hidden.dtype),
        (grad.t() @ inputs).to(weight.dtype),
        None if bias is None else grad.sum(dim=0).to(bias.dtype),
        None if norm_weight is None else _product(of_columns, input_scale).to(norm_weight.dtype),
        None if input_scale is None else _product(of_columns, norm_weight).to(input_scale.dtype),
    )


def _product(columns: Tensor, factor: Tensor | None) -> Tensor:
    return columns if factor is None else columns * factor.float()
