"""The host side of ``balance``: a kernel that sums, and one that goes back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moe_routing_backends.triton.balancing.kernels import (
    moe_routing_balance,
    moe_routing_balance_backward,
)
from moe_routing_backends.triton.kernels.spec import next_power_of_two
from moe_routing_backends.triton.planning.kernels import bins
from moe_routing_backends.triton.runtime import bound
from moe_routing_backends.triton.runtime.bound import Bound, check_interpreter
from moe_routing_backends.triton.runtime.launcher import ALIGNMENT

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.balancing.problem import BalanceProblem
    from moe_routing_registry import DeviceInfo

TILE = 2048
"""Logits of a tile, 8 for each thread; a quarter where rows begin anywhere, or kernels spill."""
THREADS = 256
SUMMING = 1024
"""Programs that sum, or one for each batch: as many on every device, since their parts are added.

More leave more parts to add, fewer leave parts of a large GPU idle.
"""
RETURNING = 8192
"""Programs that go back, likewise; each loads the gradient of the sums once."""
MOST_PACKED = 4096
"""Columns whose numbers, from 1 on, fit into the 13 low bits of a float16 that was widened."""


def build(problem: BalanceProblem, device: DeviceInfo) -> TritonBalance:
    """Bind the problem to the device; nothing is compiled before the first call."""
    check_interpreter(device)
    return TritonBalance(problem, device)


class TritonBalance(Bound):
    """A ``BalanceKernel`` of one Triton kernel and two sums, and a ``BalancesBackward`` of one."""

    def __init__(self, problem: BalanceProblem, device: DeviceInfo) -> None:
        """Compile nothing yet."""
        super().__init__(problem, device)
        self._problem = problem
        self._columns = next_power_of_two(problem.num_experts)
        self._bins = bins(problem.num_experts)
        self._maths = (problem.score, problem.counts == "best", problem.num_experts)
        short = problem.dtype in {"bfloat16", "float16"}
        self._packed = short and self._columns <= MOST_PACKED

    def __call__(
        self,
        logits: Tensor,
        ids: Tensor | None,
        weights: Tensor | None,
        sums: Tensor,
        counts: Tensor,
    ) -> None:
        """Sum over tokens; see ``BalanceKernel``."""
        batches = logits.shape[0]
        if batches > bound.MOST_PROGRAMS:
            for half in _halves(batches):
                of_half = None if ids is None else ids[half]
                its = None if weights is None else weights[half]
                self(logits[half], of_half, its, sums[half], counts[half])
            return
        vector = _vector(logits, logits)
        rows, chunks = self._rows_and_chunks(logits, vector, SUMMING)
        parts = sums.new_empty(batches, chunks, sums.shape[1])
        parts_of_counts = counts.new_empty(
            (batches, chunks, counts.shape[1]),
            dtype=torch.float32 if counts.dtype is torch.float32 else torch.int32,
        )
        self._launch(
            moe_routing_balance,
            batches * chunks,
            (logits, ids, weights, parts, parts_of_counts),
            (logits.shape[1], chunks, logits.stride(0), logits.stride(1)),
            (
                *self._maths,
                self._problem.topk,
                self._columns,
                self._bins,
                rows,
                vector,
                self._packed,
            ),
            THREADS,
            _kinds(ids, weights),
        )
        torch.sum(parts, dim=1, out=sums)
        if counts.numel():
            torch.sum(parts_of_counts, dim=1, dtype=counts.dtype, out=counts)

    def backward(
        self, grad: Tensor, logits: Tensor, weights: Tensor | None, grad_logits: Tensor
    ) -> None:
        """Write the gradient; see ``BalancesBackward``."""
        batches = logits.shape[0]
        if batches > bound.MOST_PROGRAMS:
            for half in _halves(batches):
                its = None if weights is None else weights[half]
                self.backward(grad[half], logits[half], its, grad_logits[half])
            return
        vector = _vector(logits, logits, grad_logits)
        rows, chunks = self._rows_and_chunks(logits, vector, RETURNING)
        self._launch(
            moe_routing_balance_backward,
            batches * chunks,
            (grad, logits, weights, grad_logits),
            (logits.shape[1], chunks, logits.stride(0), logits.stride(1)),
            (*self._maths, self._columns, rows, vector),
            THREADS,
            _kinds(weights),
        )

    def _rows_and_chunks(self, logits: Tensor, vector: int, programs: int) -> tuple[int, int]:
        """Return the rows of a tile, and how many programs share the tokens of a batch."""
        batches, tokens, _ = logits.shape
        rows = max(1, (TILE if vector > 1 else TILE // 4) // self._columns)
        return rows, max(1, min(-(-tokens // rows), programs // batches))


def _vector(logits: Tensor, *tensors: Tensor) -> int:
    """Return how many columns are read at a time: rows begin at multiples of them."""
    size = logits.element_size()
    bits = ALIGNMENT | logits.shape[2] * size
    for dim in (0, 1):
        if logits.shape[dim] > 1:
            bits |= logits.stride(dim) * size
    for tensor in tensors:
        bits |= tensor.data_ptr()
    return (bits & -bits) // size


def _kinds(*tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if tensor is None else tensor.dtype for tensor in tensors)


def _halves(batches: int) -> tuple[slice, slice]:
    """Return two halves of the batches: a launch has fewer programs than there are."""
    return slice(None, batches // 2), slice(batches // 2, None)
