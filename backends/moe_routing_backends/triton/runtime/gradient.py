"""The host side of the backward kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moe_routing.private_api import current_device, current_stream, is_observed
from moe_routing_backends.triton.kernels.backward import moe_routing_backward
from moe_routing_backends.triton.kernels.spec import UNROLL_UP_TO, kernel_spec, next_power_of_two
from moe_routing_backends.triton.runtime.launcher import ALIGNMENT, as_readable

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing_backends.triton.runtime.launcher import Compiled
    from moe_routing_registry import RoutingProblem

RUNTIME_ARGUMENTS = 9
"""How many arguments of the kernel stand before its constants."""
MOST_SUMS = 2048
"""Partial sums of the scale's gradient, one a program.

T alone fixes their number, so that they are added alike in every run.
"""
EXPERTS_A_WARP = 512
"""Experts that a warp holds in registers: of one row, or of several."""


def constants(problem: RoutingProblem) -> tuple[dict[str, Any], int]:
    """Return the kernel's constants that do not depend on a call, and its number of warps."""
    size, k = next_power_of_two(problem.num_experts), problem.topk
    return {
        "SPEC": kernel_spec(problem),
        "SIZE": size,
        "N": next_power_of_two(k),
        "UNROLL": k if k <= UNROLL_UP_TO else max(d for d in range(1, 9) if k % d == 0),
        "BLOCK_T": max(1, EXPERTS_A_WARP // size),
    }, max(1, size // EXPERTS_A_WARP)


class Gradient:
    """Goes back through the weights of one problem.

    A call makes two allocations, one kernel, and a sum where there is a scale.
    """

    def __init__(self, problem: RoutingProblem, index: int, compiled: Compiled) -> None:
        """Compile nothing yet."""
        self._index = index
        self._compiled = compiled
        self._constants, self._num_warps = constants(problem)

    def __call__(
        self, grad_weights: Tensor, logits: Tensor, ids: Tensor, per_expert_scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See ``TritonRouter.backward``."""
        T, experts = logits.shape
        row_stride, expert_stride = logits.stride()
        blocks = -(-T // self._constants["BLOCK_T"])
        grad_logits = torch.empty((T, experts), dtype=logits.dtype, device=logits.device)
        sums = None
        given, per_expert_scale = per_expert_scale, as_readable(per_expert_scale)
        if per_expert_scale is not None:
            per_expert_scale = per_expert_scale.contiguous()
            blocks = min(blocks, MOST_SUMS)
            sums = torch.empty((blocks, experts), dtype=torch.float32, device=logits.device)
        dense = row_stride == experts and expert_stride == 1
        named = {
            **self._constants,
            "ROW_STRIDE": experts if dense else 0,
            "EXPERT_STRIDE": int(expert_stride == 1),
        }
        fixed = tuple(named[name] for name in moe_routing_backward.arg_names[RUNTIME_ARGUMENTS:])
        scale_dtype = None if per_expert_scale is None else per_expert_scale.dtype
        key = ("backward", dense, expert_stride == 1, logits.data_ptr() % ALIGNMENT, scale_dtype)
        arguments = (
            grad_weights, logits, ids, per_expert_scale, grad_logits, sums,
            T, row_stride, expert_stride,
        )  # fmt: skip
        ready = self._compiled.launchers.get(key)
        if ready is None or current_device() != self._index or is_observed():
            self._compiled.launch_and_keep(
                key, moe_routing_backward, blocks, arguments, fixed, self._num_warps
            )
        else:
            pointers = (a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments)
            ready(blocks, current_stream(self._index), tuple(pointers))
        if given is None or sums is None:
            return grad_logits, logits.new_empty(0)
        return grad_logits, sums.sum(0).to(given.dtype)
