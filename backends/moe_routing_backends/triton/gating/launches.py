"""How the kernels of ``gate`` are launched for a number of logits, and how they add.

What fixes the order of summation, ``Order``, is one for all launches of a problem on a device. A
launch may choose the tile of a program and whether a program takes one slice or all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moe_routing.gating import GateProblem
    from moe_routing_registry import DeviceInfo

SLICE = 256
"""Columns whose products a matrix unit adds.

Up to 4,096 tokens it was the fastest or within 5 % of it; 512 is up to 20 % faster at 1,024 tokens,
and 128 as much at 16,384. A problem has one for all numbers of tokens, or bits would differ.
"""
SLICE_OF_SCALED = 128
"""The same where vectors multiply the hidden states, which takes longer a column."""
STEP = 128
"""Columns of both factors that are in registers at a time, where each is one number."""


class Order(NamedTuple):
    """What the bits of a sum depend on.

    :ivar slice: columns of a slice.
    :ivar step: columns at a time of these.
    :ivar hidden_parts: bfloat16 numbers that a hidden state is the sum of; 0 means itself.
    :ivar weight_parts: likewise of a weight.
    :ivar scales_hidden: vectors of columns multiply the hidden states, not the weight.
    """

    slice: int
    step: int
    hidden_parts: int
    weight_parts: int
    scales_hidden: bool = True


class GateLaunch(NamedTuple):
    """How some number of logits, tokens times experts, are made.

    :ivar logits: most of them; ``None`` means any number.
    :ivar block_t: tokens a program.
    :ivar block_e: experts a program.
    :ivar num_warps: warps a program.
    :ivar split: a program takes one slice, and the kernel that routes adds them.
    :ivar stages: slices that are under way at a time, where a program takes all.
    """

    logits: int | None
    block_t: int
    block_e: int
    num_warps: int
    split: bool = False
    stages: int = 2


SM_90: tuple[GateLaunch, ...] = (
    GateLaunch(32 * 128, 16, 64, 4, split=True),
    GateLaunch(96 * 128, 32, 64, 4, split=True),
    GateLaunch(2048 * 128, 64, 64, 4, split=True),
    GateLaunch(6144 * 128, 32, 64, 4),
    GateLaunch(None, 64, 128, 8),
)
"""Tiles of 64 experts or more in four warps or more, all of which get ``wgmma``.

Measured on an H100 (`benchmarks/results/h100-2026-11-27-gate-tried.json`).
"""
MANY = 1024 * 128
"""Logits from which PyTorch's product is at least 10 % faster, where any order will do."""
ONE_TILE: tuple[GateLaunch, ...] = (
    GateLaunch(256 * 128, 32, 32, 4, split=True),
    GateLaunch(None, 32, 32, 4, stages=1),
)
"""Elsewhere: Triton picks an instruction by the tile, so there is one tile.

Of fewer than 64 experts, for which it does not pick ``tcgen05`` on compute capability 10.0: there
Triton 3.7 compiles some of these kernels to nothing.
"""


def launches_for(device: DeviceInfo) -> Sequence[GateLaunch]:
    """Return the launches by rising number of logits; the last has no end."""
    return SM_90 if device.arch == "sm_90" else ONE_TILE


def order_of(problem: GateProblem, vectors: Sequence[torch.dtype]) -> Order:
    """Return the order for a problem whose columns have vectors of these dtypes.

    The kernels' first lines say why bfloat16 times bfloat16 takes two parts. A float16 number has
    11 bits, for which bfloat16 takes two; products of two float16 matrices are exact as they are.
    """
    if problem.float32_weight or problem.dtype == "float32":
        hidden_parts = {"bfloat16": 0, "float16": 2, "float32": 3}[problem.dtype]
        step = STEP // 4 if hidden_parts else STEP // 2  # more parts take more registers a column
        return Order(SLICE, step, hidden_parts, 3, scales_hidden=False)
    if not vectors:
        return Order(SLICE, STEP, 0, 0)
    if problem.dtype == "float16":
        return Order(SLICE_OF_SCALED, STEP // 4, 3, 2)
    return Order(SLICE_OF_SCALED, STEP // 2, 2 if list(vectors) == [torch.bfloat16] else 3, 0)
