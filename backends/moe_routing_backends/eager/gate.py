"""The logits of ``gate`` in plain PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moe_routing.formula import gate as formula

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from moe_routing.gating import GateKernel, GateProblem, Projection
    from moe_routing_registry import DeviceInfo

U = 2.0**-53
"""The unit roundoff of float64."""
SUMS_AT_A_TIME = 128
"""Sums of up to 16,384 terms that are added in the one order at a time: 16 MiB."""


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
    dtype = torch.float32 if projection.hidden.device.type == "mps" else torch.float64
    logits.copy_(formula.logits(projection, dtype).float())


def in_float32(projection: Projection, logits: Tensor) -> None:
    """Fill the logits likewise, in half the time where float32 products are made of float32."""
    if _float32_is_exact():
        logits.copy_(formula.logits(projection, torch.float32))
    else:
        in_any_order(projection, logits)


def _float32_is_exact() -> bool:
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None:  # before PyTorch 2.9
        return torch.get_float32_matmul_precision() == "highest"
    return matmul.fp32_precision in ("none", "ieee")


def in_one_order(projection: Projection, logits: Tensor) -> None:
    """Fill the logits with sums in an order that depends on H alone; see ``GateKernel``.

    Each logit is the float64 sum of its terms in one order, ``pairwise``, rounded. PyTorch's
    product adds in an order of its own, which depends on the number of tokens. But it is within a
    bound of any other order, so where both ends of that bound round to one number, the number is
    known; the few sums that are left, one in some hundreds, are added in the one order.
    """
    hidden, weight = projection.hidden.double(), projection.router_weight.double()
    bias = projection.router_bias
    squares = formula.mean_square(projection, torch.float64)
    if projection.eps is not None:
        columns = hidden.shape[1]

        def mean(total: Tensor) -> Tensor:
            return (total / columns).float()

        squares = _in_one_order(
            squares * columns,
            _margin(columns) * squares * columns,
            lambda row, _: hidden[row].square(),
            lambda total, _: mean(total),
        ).double()
    inputs = formula.router_inputs(projection, squares)

    def rounded(sums: Tensor, expert: Tensor | slice) -> Tensor:
        return (sums if bias is None else sums + bias[expert].double()).float()

    lengths = inputs.norm(dim=1)[:, None] * weight.norm(dim=1)
    logits.copy_(
        _in_one_order(
            inputs @ weight.t(),
            _margin(inputs.shape[1]) * lengths,
            lambda row, expert: inputs[row] * weight[expert],
            rounded,
        )
    )


def _margin(terms: int) -> float:
    """Return how far two float64 sums may be apart, for a sum of magnitudes of 1.

    Each errs by at most ``terms * U``, whatever its order; a few more roundings are in the
    magnitudes themselves, and in the products.
    """
    return 2 * (terms + 8) * U


def _in_one_order(
    sums: Tensor,
    margin: Tensor,
    terms: Callable[[Tensor, Tensor], Tensor],
    rounded: Callable[[Tensor, Tensor | slice], Tensor],
) -> Tensor:
    """Return ``rounded(pairwise(terms))`` of each place of a matrix.

    :param sums: sums of the terms in any order, ``[M, N]``.
    :param margin: how far these are at most from sums in another order.
    :param terms: given rows and columns of places, returns what is added there, ``[P, H]``.
    :param rounded: rounds sums of given columns, and is monotonic.
    """
    everywhere = slice(None)
    made = rounded(sums, everywhere)
    ends = rounded(sums - margin, everywhere), rounded(sums + margin, everywhere)
    unsure = (ends[0] != ends[1]).nonzero()  # NaN is unlike itself, so it is unsure
    for places in unsure.split(SUMS_AT_A_TIME):
        row, column = places.unbind(1)
        made[row, column] = rounded(pairwise(terms(row, column)), column)
    return made


def pairwise(terms: Tensor) -> Tensor:
    """Add up the columns: the first half to the second, until one is left.

    >>> pairwise(torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]]))
    tensor([15.])
    """
    while (columns := terms.shape[1]) > 1:
        half, odd = divmod(columns, 2)
        added = terms[:, :half] + terms[:, half : 2 * half]
        terms = torch.cat([added, terms[:, -1:]], dim=1) if odd else added
    return terms[:, 0]
