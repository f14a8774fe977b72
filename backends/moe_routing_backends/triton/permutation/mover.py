"""The host side of ``permute`` and ``combine``: launching one kernel a call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import triton.language as tl

from moe_routing_backends.triton.permutation.kernels import (
    moe_routing_combine,
    moe_routing_combine_backward,
    moe_routing_permute,
    moe_routing_permute_quantized,
)
from moe_routing_backends.triton.runtime import bound
from moe_routing_backends.triton.runtime.bound import Bound, check_interpreter
from moe_routing_backends.triton.runtime.launcher import ALIGNMENT

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.permutation.problem import CombineProblem, PermuteProblem
    from moe_routing.planning import DispatchPlan
    from moe_routing_registry import DeviceInfo

TensorT = TypeVar("TensorT", "Tensor", "Tensor | None")

PLACES = 32
"""Places that a program looks through for empty ones."""
BACKWARD_COLUMNS = 1024
"""Columns at a time of the backward kernel.

One number for all: it fixes the order in which columns are added.
"""
BACKWARD_THREADS = 128
COLUMNS = 16
"""Columns of a quantized row whose bytes are a vector."""
UNITS = {1: tl.uint8, 2: tl.uint16, 4: tl.uint32, 8: tl.uint64}
"""Integers that rows are moved as, by their bytes."""


class MoveLaunch(NamedTuple):
    """How a kernel is launched.

    :ivar vectors: 16 bytes each that a program takes of a row; of a quantized row 16 columns each.
    :ivar threads: of a program.
    :ivar early: the next kernel may be placed before this one's programs have ended.
    """

    vectors: int
    threads: int
    early: bool


SHORT = MoveLaunch(32, 32, early=True)
LONG = MoveLaunch(128, 128, early=False)
LONG_FROM = 65
"""Tokens from which rows are moved in long slices; they are always added in short ones.

Measured on an H100 with torch 2.11 and Triton 3.6 (``benchmarks/permutation.py``).
"""


def build_permute(problem: PermuteProblem, device: DeviceInfo) -> TritonPermute:
    """Bind the problem to the device; nothing is compiled before the first call."""
    check_interpreter(device)
    return TritonPermute(problem, device)


def build_combine(problem: CombineProblem, device: DeviceInfo) -> TritonCombine:
    """Bind the problem to the device, likewise."""
    check_interpreter(device)
    return TritonCombine(problem, device)


class _Mover(Bound):
    """A kernel of either operation: the device, and launching."""

    def __init__(
        self,
        problem: PermuteProblem | CombineProblem,
        device: DeviceInfo,
        launch: MoveLaunch | None = None,
    ) -> None:
        """Compile nothing yet.

        :param launch: this one for any number of tokens.
        """
        super().__init__(problem, device)
        self._K = problem.topk
        self._launches = (SHORT, LONG) if launch is None else (launch, launch)

    def _vectors(self, launch: MoveLaunch) -> int:
        return max(launch.vectors, self._warp)  # one a lane at least

    def _move(  # noqa: PLR0913 -- what a call hands over
        self,
        hidden: Tensor,
        inverse: Tensor,
        plan: DispatchPlan,
        out: Tensor,
        scales: Tensor | None = None,
        *,
        fills: bool,
    ) -> None:
        """Move the rows of some tokens.

        :param inverse: of these tokens.
        :param fills: write zeros to empty places.
        """
        T, H = hidden.shape
        size, launch = hidden.element_size(), self._launches[T >= LONG_FROM]
        stride = hidden.stride(0) if T > 1 else H
        aligned = not (hidden.data_ptr() | out.data_ptr()) % ALIGNMENT
        unit: tuple[Any, ...] = ()
        given = () if scales is None else (scales,)
        if scales is not None:
            vector = COLUMNS if aligned and not (H | stride) % COLUMNS else 1
            block = self._vectors(launch) * COLUMNS
        else:
            bits = hidden.data_ptr() | out.data_ptr() | H * size | stride * size | ALIGNMENT
            lane = bits & -bits  # bytes
            bytes_ = min(lane, 8)
            vector, block = lane // bytes_, self._vectors(launch) * ALIGNMENT // bytes_
            unit = (UNITS[bytes_],)
            H, stride = H * size // bytes_, stride * size // bytes_
        slices, places, pairs = -(-H // block), plan.order.numel(), plan.inverse.numel()
        programs = (T + (-(-places // PLACES) if fills else 0)) * slices
        if programs > bound.MOST_PROGRAMS:
            for part in _halves(T):
                self._move(hidden[part], inverse[part], plan, out, scales, fills=fills)
            return
        self._launch(
            moe_routing_permute if scales is None else moe_routing_permute_quantized,
            programs,
            (hidden, plan.order, inverse, plan.offsets, out, *given),
            (T, pairs, places, plan.offsets.numel() - 1, H // vector, stride // vector),
            (self._K, *unit, vector, block, PLACES if fills else 0, self._pdl and launch.early),
            launch.threads,
        )


class TritonPermute(_Mover):
    """A ``PermuteKernel`` of one Triton kernel."""

    def __init__(
        self, problem: PermuteProblem, device: DeviceInfo, launch: MoveLaunch | None = None
    ) -> None:
        """Compile nothing yet."""
        super().__init__(problem, device, launch)
        self._fills = problem.layout != "masked"

    def __call__(
        self, hidden: Tensor, plan: DispatchPlan, out: Tensor, *, scales: Tensor | None = None
    ) -> None:
        """Move the rows; see ``PermuteKernel``."""
        self._move(_in_memory(hidden), plan.inverse, plan, out, scales, fills=self._fills)


class TritonCombine(_Mover):
    """A ``CombineKernel`` of one Triton kernel, and a ``CombinesBackward`` of another."""

    def __call__(
        self, rows: Tensor, plan: DispatchPlan, weights: Tensor | None, out: Tensor
    ) -> None:
        """Add the rows; see ``CombineKernel``."""
        self._add(_in_memory(rows), plan.inverse, plan, _in_memory(weights), out)

    def _add(
        self, rows: Tensor, inverse: Tensor, plan: DispatchPlan, weights: Tensor | None, out: Tensor
    ) -> None:
        """Add the rows of some tokens, to whom ``inverse``, ``weights`` and ``out`` belong."""
        (T, H), places = out.shape, len(rows)
        size, launch = rows.element_size(), self._launches[0]
        stride = rows.stride(0) if places > 1 else H
        vector = _vector(size, (rows, out), (H, stride))
        block = self._vectors(launch) * ALIGNMENT // size
        programs = T * -(-H // block)
        if programs > bound.MOST_PROGRAMS:
            for part in _halves(T):
                its = None if weights is None else weights[part]
                self._add(rows, inverse[part], plan, its, out[part])
            return
        self._launch(
            moe_routing_combine,
            programs,
            (rows, inverse, plan.offsets, weights, out),
            (places, plan.offsets.numel() - 1, H // vector, stride // vector),
            (self._K, vector, block, self._pdl and launch.early),
            launch.threads,
        )

    def backward(  # noqa: PLR0913, PLR0917 -- as in the protocol
        self,
        grad: Tensor,
        rows: Tensor,
        plan: DispatchPlan,
        weights: Tensor | None,
        grad_rows: Tensor,
        grad_weights: Tensor | None,
    ) -> None:
        """Write the gradients; see ``CombinesBackward``."""
        grad = _in_memory(grad)
        if weights is None or grad_weights is None:
            self._move(grad, plan.inverse, plan, grad_rows, fills=True)
            return
        rows, weights = _in_memory(rows), _in_memory(weights)
        self._go_back(grad, rows, plan.inverse, plan, weights, grad_rows, grad_weights)

    def _go_back(  # noqa: PLR0913, PLR0917 -- likewise
        self,
        grad: Tensor,
        rows: Tensor,
        inverse: Tensor,
        plan: DispatchPlan,
        weights: Tensor,
        grad_rows: Tensor,
        grad_weights: Tensor,
    ) -> None:
        """Write the gradients of some tokens and of their rows."""
        (T, H), places = grad.shape, len(rows)
        stride = rows.stride(0) if places > 1 else H
        grad_stride = grad.stride(0) if T > 1 else H
        vector = _vector(rows.element_size(), (grad, rows, grad_rows), (H, stride, grad_stride))
        programs = T * self._K - (-places // PLACES)
        if programs > bound.MOST_PROGRAMS:
            for part in _halves(T):
                self._go_back(
                    grad[part], rows, inverse[part], plan, weights[part], grad_rows,
                    grad_weights[part],
                )  # fmt: skip
            return
        self._launch(
            moe_routing_combine_backward,
            programs,
            (grad, rows, plan.order, inverse, plan.offsets, weights, grad_rows, grad_weights),
            (
                T, plan.inverse.numel(), places, plan.offsets.numel() - 1, H // vector,
                grad_stride // vector, stride // vector,
            ),
            (self._K, vector, BACKWARD_COLUMNS, PLACES, self._pdl),
            BACKWARD_THREADS,
        )  # fmt: skip


def _in_memory(tensor: TensorT) -> TensorT:
    """Return a tensor without lazy negation and conjugation, of which a kernel knows nothing."""
    return tensor if tensor is None else tensor.resolve_conj().resolve_neg()


def _vector(size: int, tensors: tuple[Tensor, ...], columns: tuple[int, ...]) -> int:
    """Return how many elements of ``size`` bytes a vector has.

    :param columns: a row's elements, and those between the beginnings of two rows.
    """
    vector = ALIGNMENT // size
    whole = not any(number % vector for number in columns)
    return vector if whole and not any(t.data_ptr() % ALIGNMENT for t in tensors) else 1


def _halves(tokens: int) -> tuple[slice, slice]:
    """Return two halves of the tokens: a launch has fewer programs than they need."""
    return slice(None, tokens // 2), slice(tokens // 2, None)
