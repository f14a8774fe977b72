"""The logits of ``gate`` in plain PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moe_routing.formula import gate as formula

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.gating import GateKernel, GateProblem, Projection
    from moe_routing_registry import DeviceInfo

U = 2.0**-53
"""The unit roundoff of float64."""
TERMS_AT_A_TIME = 1 << 22
"""Numbers of inputs, or terms of sums, that are in memory at a time: 32 MiB."""


def build(problem: GateProblem, device: DeviceInfo) -> GateKernel:
    """Make the kernel; there is nothing to compile."""
    if problem.invariant:
        return in_one_order
    return in_float32 if device.platform == "cpu" else in_any_order


def in_any_order(projection: Projection, logits: Tensor) -> None:
    """Fill the logits, summed in whatever order PyTorch's product has; see ``GateKernel``.

    In float64, where the device has it: float32 products may be made of shorter numbers
    (TensorFloat32, bfloat16), as the process has set.
    """
    logits.copy_(formula.logits(projection, _widest(projection)).float())


def in_float32(projection: Projection, logits: Tensor) -> None:
    """Fill the logits likewise, in half the time where float32 products are made of float32."""
    if _float32_is_exact():
        logits.copy_(formula.logits(projection, torch.float32))
    else:
        in_any_order(projection, logits)


def _widest(projection: Projection) -> torch.dtype:
    """Return float64, or float32 where the device has none."""
    return torch.float32 if projection.hidden.device.type == "mps" else torch.float64


def _float32_is_exact() -> bool:
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None:  # before PyTorch 2.9
        return torch.get_float32_matmul_precision() == "highest"
    return matmul.fp32_precision in ("none", "ieee")


def in_one_order(projection: Projection, logits: Tensor) -> None:
    """Fill the logits with sums in an order that depends on H alone; see ``GateKernel``.

    Each logit is the sum of its terms in one order, ``pairwise``, in float64 and rounded once.
    """
    hidden, dtype = projection.hidden, _widest(projection)
    weight = projection.router_weight.to(dtype)
    bias = projection.router_bias
    added = None if bias is None else bias.to(dtype)
    fill = _by_product if hidden.device.type == "cpu" else _by_terms
    at_a_time = max(1, TERMS_AT_A_TIME // hidden.shape[1])
    for rows, made in zip(hidden.split(at_a_time), logits.split(at_a_time), strict=True):
        squares = torch.zeros(len(rows), 1, dtype=dtype, device=rows.device)
        if projection.eps is not None:
            squares = pairwise(rows.to(dtype).square())[:, None] / rows.shape[1]
        inputs = formula.router_inputs(projection._replace(hidden=rows), squares)
        fill(inputs, weight, added, made)


def _by_terms(inputs: Tensor, weight: Tensor, bias: Tensor | None, logits: Tensor) -> None:
    """Fill the logits with sums that are added term by term."""
    at_a_time = max(1, TERMS_AT_A_TIME // weight.numel())
    for rows, made in zip(inputs.split(at_a_time), logits.split(at_a_time), strict=True):
        made.copy_(_rounded(pairwise(rows[:, None] * weight), bias))


def _by_product(inputs: Tensor, weight: Tensor, bias: Tensor | None, logits: Tensor) -> None:
    """Fill the logits with the same sums, by PyTorch's product as far as it goes.

    Its order depends on the number of tokens. But it is within a bound of any other order, so where
    both ends of that bound round to one number, the number is known; only the sums that are left,
    one in some hundreds, are added term by term. Which ones those are is read on the host.
    """
    sums = inputs @ weight.t()
    # A float64 sum errs by at most H * U of the magnitudes of its terms, in any order; a few more
    # roundings are in the terms and in the magnitudes.
    lengths = [torch.linalg.vector_norm(rows, dim=1) for rows in (inputs, weight)]
    margin = lengths[0][:, None] * lengths[1] * (2 * (inputs.shape[1] + 8) * U)
    made = _rounded(sums, bias)
    unsure = _rounded(sums - margin, bias) != _rounded(sums + margin, bias)
    # NaN and infinity are the same in any order, but NaN has many bits.
    unsure &= sums.isfinite() & ~made.isnan()
    made.masked_fill_(made.isnan(), torch.nan)
    for places in unsure.nonzero().split(max(1, TERMS_AT_A_TIME // 16 // inputs.shape[1])):
        row, expert = places.unbind(1)
        some = pairwise(inputs[row] * weight[expert])
        made[row, expert] = _rounded(some, None if bias is None else bias[expert])
    logits.copy_(made)


def _rounded(sums: Tensor, bias: Tensor | None) -> Tensor:
    # The sign of a zero depends on the order, as in -0 + 0; adding 0 makes all zeros one.
    return (sums if bias is None else sums + bias).float() + 0.0


def pairwise(terms: Tensor) -> Tensor:
    """Add up the last dimension: the first half to the second, until one is left.

    >>> pairwise(torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]]))
    tensor([15.])
    """
    while (columns := terms.shape[-1]) > 1:
        half, odd = divmod(columns, 2)
        added = terms[..., :half] + terms[..., half : 2 * half]
        terms = torch.cat([added, terms[..., -1:]], dim=-1) if odd else added
    return terms[..., 0]
