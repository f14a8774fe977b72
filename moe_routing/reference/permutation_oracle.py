"""``permute`` and ``combine`` by their definitions, on the CPU; written from the contract alone.

Slow, and independent of every backend. Rows that are moved have one right result. Sums have a least
and a greatest one: each step of the float32 sum is rounded, and two things are left to a backend.

*   A product may be rounded before it is added, or not (a fused multiply-add).
*   A product or a sum below ``2**-126`` may be flushed to zero.

Rounding is monotonic. So where a partial sum lies in ``[a, b]`` and the product in ``[p, q]``, the
next partial sum lies between the rounded ``a + p`` and the rounded ``b + q``, and the result lies
between what the last two ends are rounded to. The product of two float32 numbers is exact in
float64. No bound is estimated, sums that overflow need no rule of their own, and another order of
the slots shows wherever it changes more than this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.planning.kernel import DispatchPlan

GROUP = 128
LARGEST = 448.0
LEAST = 1e-10
U = 2.0**-24
"""The unit roundoff of float32."""
TINY = 2.0**-126
"""The least normal float32: what is smaller may be flushed to zero."""
_CODES = 128
"""Of float8_e4m3fn without the sign."""


class Between(NamedTuple):
    """The least and the greatest right value of each element; both are NaN where NaN is right.

    Where one alone is NaN, a sum may overflow or not, and any value is right.
    """

    least: Tensor
    greatest: Tensor


def tokens(plan: DispatchPlan) -> list[int]:
    """Return the token of each place, -1 for places without a pair.

    >>> from moe_routing.planning import PlanProblem
    >>> from moe_routing.reference.plan_oracle import plan
    >>> tokens(plan(PlanProblem(num_experts=2, topk=2), torch.tensor([[1, 0], [-1, 1]])))
    [0, 0, 1, -1]
    """
    pairs, topk = plan.inverse.numel(), plan.inverse.shape[1]
    end = int(plan.offsets[-1])
    return [
        pair // topk if place < end and 0 <= pair < pairs else -1
        for place, pair in enumerate(plan.order.reshape(-1).tolist())
    ]


def is_empty(plan: DispatchPlan) -> Tensor:
    """Return which places have no pair: ``[P]``."""
    return torch.tensor([token < 0 for token in tokens(plan)], dtype=torch.bool)


def places(plan: DispatchPlan) -> list[list[int]]:
    """Return the place of each pair ``[T][K]``, -1 for pairs without one."""
    end = min(int(plan.offsets[-1]), plan.order.numel())
    return [[place if 0 <= place < end else -1 for place in row] for row in plan.inverse.tolist()]


def permute(hidden: Tensor, plan: DispatchPlan) -> Tensor:
    """Return the row of its token at each place ``[P, H]``, and zeros at places without a pair."""
    packed = hidden.detach().cpu().clone(memory_format=torch.contiguous_format)
    rows = packed.view(torch.uint8)  # no operation takes every dtype
    zeros = torch.zeros(1, rows.shape[1], dtype=torch.uint8)
    which = torch.tensor(tokens(plan), dtype=torch.int64)
    return torch.cat((rows, zeros))[which].view(hidden.dtype)  # row -1 is the last one, the zeros


def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows ``[N, H]`` as float8_e4m3fn, and their scales: ``[N, ceil(H / 128)]``.

    Each group of 128 values has the scale ``max(m, 1e-10) / 448``, where m is its largest
    magnitude, NaN if any is; a value becomes ``value / scale``, rounded to float32 and then to the
    nearest float8, of two nearest the even one. float64 divides two float32 numbers so exactly that
    rounding the quotient again gives what float32 gives.
    """
    least = torch.tensor(LEAST, dtype=torch.float32).double()
    exact = rows.detach().cpu().double()
    quantized, scales = [], []
    for group in exact.split(GROUP, dim=1):
        largest = group.abs().amax(dim=1, keepdim=True)  # NaN if any value is
        scale = (torch.where(largest < least, least, largest) / LARGEST).float()
        quantized.append(to_float8((group / scale.double()).float().double()))
        scales.append(scale)
    return torch.cat(quantized, dim=1), torch.cat(scales, dim=1)


def to_float8(values: Tensor) -> Tensor:
    """Round to float8_e4m3fn by looking among all its values."""
    codes = torch.arange(_CODES - 1, dtype=torch.uint8)  # of 0 to 448; the next one is NaN
    known = codes.view(torch.float8_e4m3fn).double()
    middles = (known[1:] + known[:-1]) / 2
    magnitude = values.abs().contiguous()
    below = torch.bucketize(magnitude, middles)  # in the middle: the smaller
    tie = (below < len(middles)) & (magnitude == middles[below.clamp(max=len(middles) - 1)])
    nearest = (below + (tie & (below % 2 == 1)).long()).to(torch.uint8)
    signed = torch.where(values.signbit(), nearest + _CODES, nearest)
    return torch.where(values.isnan(), _CODES - 1, signed).to(torch.uint8).view(torch.float8_e4m3fn)


def combine(rows: Tensor, plan: DispatchPlan, weights: Tensor | None = None) -> Between:
    """Return between what the sum over the slots of each token may lie: ``[T, H]`` each.

    >>> from moe_routing.planning import PlanProblem
    >>> from moe_routing.reference.plan_oracle import plan
    >>> ids, rows = torch.tensor([[1, 0], [-1, 1]]), torch.tensor([[1.0], [2.0], [4.0], [8.0]])
    >>> sums = combine(rows, plan(PlanProblem(num_experts=2, topk=2), ids))
    >>> sums.least.flatten().tolist(), sums.greatest.flatten().tolist()
    ([3.0, 4.0], [3.0, 4.0])
    """
    exact = rows.detach().cpu().double()
    every = torch.tensor(places(plan), dtype=torch.int64).view(plan.inverse.shape)
    least = torch.zeros(plan.inverse.shape[0], rows.shape[1], dtype=torch.float64)
    greatest = least.clone()
    for k in range(plan.inverse.shape[1]):
        tokens_here = (every[:, k] >= 0).nonzero()[:, 0]
        product = exact[every[tokens_here, k]]
        if weights is not None:
            product = product * weights.detach().cpu().double()[tokens_here, k : k + 1]
        either = torch.stack((product, product.float().double(), _flushed(product)))
        low, high = least[tokens_here], greatest[tokens_here]
        least[tokens_here] = _sum(low, either.amin(0), -torch.inf)
        greatest[tokens_here] = _sum(high, either.amax(0), torch.inf)
    return Between(least.float().to(rows.dtype), greatest.float().to(rows.dtype))


def _flushed(values: Tensor) -> Tensor:
    """Return the values, and 0 for those that may be flushed to zero."""
    return torch.where(values.abs() < TINY, 0.0, values)


def _sum(a: Tensor, b: Tensor, end: float) -> Tensor:
    """Return the float32 sum of two float64 numbers; where it may be flushed, the one near ``end``.

    float64 may round the sum to the middle between two float32 numbers, from which rounding again
    goes to the wrong one. What float64 rounded away is exact (Knuth's two-sum), and tells on which
    side of the middle the sum is.
    """
    total = a + b
    of_b = total - a
    lost = (a - (total - of_b)) + (b - of_b)
    side = torch.nextafter(total, torch.sign(lost) * torch.inf)
    rounded = torch.where((lost != 0) & lost.isfinite(), side, total).float().double()
    both = torch.stack((rounded, _flushed(rounded)))
    return both.amax(0) if end > 0 else both.amin(0)


def gradient_of_rows(
    grad: Tensor, plan: DispatchPlan, weights: Tensor | None, dtype: torch.dtype
) -> Between:
    """Return between what the gradient of the rows of ``combine`` may lie: ``[P, H]``.

    At the place of the pair (t, k) it is ``weights[t, k] * grad[t]``, in float32, rounded once to
    the rows' dtype, and 0 at places without a pair.
    """
    exact = grad.detach().cpu().double()
    products = torch.zeros(plan.order.numel(), grad.shape[1], dtype=torch.float64)
    of_pairs = None if weights is None else weights.detach().cpu().double().reshape(-1).tolist()
    pairs = plan.order.view(-1).tolist()
    for place, (token, pair) in enumerate(zip(tokens(plan), pairs, strict=True)):
        if token >= 0:
            products[place] = exact[token] * (1.0 if of_pairs is None else of_pairs[pair])
    both = torch.stack((products.float(), _flushed(products).float()))
    return Between(both.amin(0).to(dtype), both.amax(0).to(dtype))


def gradient_of_weights(
    grad: Tensor, rows: Tensor, plan: DispatchPlan, dtype: torch.dtype
) -> Between:
    """Return between what the gradient of the weights of ``combine`` may lie: ``[T, K]``.

    That of the pair (t, k) is the sum over the H columns of ``grad[t] * rows[inverse[t, k]]``, and
    0 for a pair without a place. The products are added in float32 in any order, which errs by no
    more than ``H u / (1 - H u)`` times the sum of their magnitudes, and the sum is rounded once.
    """
    exact, values = grad.detach().cpu().double(), rows.detach().cpu().double()
    sums = torch.zeros(plan.inverse.shape, dtype=torch.float64)
    errors = torch.zeros_like(sums)
    columns = rows.shape[1]
    for t, of_slots in enumerate(places(plan)):
        for k, place in enumerate(of_slots):
            if place >= 0:
                products = exact[t] * values[place]
                sums[t, k] = products.sum()
                finite = products[products.isfinite()].abs().sum()
                errors[t, k] = columns * U / (1 - columns * U) * finite + columns * TINY
    least, greatest = (sums - errors).float(), (sums + errors).float()
    return Between(least.to(dtype), greatest.to(dtype))
