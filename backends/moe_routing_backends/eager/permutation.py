"""``permute`` and ``combine`` in plain PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_routing.formula.permutation import combined, permuted, quantized

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.permutation import CombineKernel, CombineProblem, PermuteKernel, PermuteProblem
    from moe_routing.planning import DispatchPlan
    from moe_routing_registry import DeviceInfo


def build_permute(problem: PermuteProblem, _device: DeviceInfo) -> PermuteKernel:
    """Make the kernel; there is nothing to compile."""

    def fill(
        hidden: Tensor, plan: DispatchPlan, out: Tensor, *, scales: Tensor | None = None
    ) -> None:
        if not problem.quantize or scales is None:
            out.copy_(permuted(hidden, plan))
            return
        # Tokens are quantized before they are copied to their slots: 1 / K of the work.
        values, of_tokens = quantized(hidden)
        out.copy_(permuted(values, plan))
        scales.copy_(permuted(of_tokens, plan))

    return fill


def build_combine(_problem: CombineProblem, _device: DeviceInfo) -> CombineKernel:
    """Make the kernel, likewise."""

    def fill(rows: Tensor, plan: DispatchPlan, weights: Tensor | None, out: Tensor) -> None:
        out.copy_(combined(rows, plan, weights))

    return fill
