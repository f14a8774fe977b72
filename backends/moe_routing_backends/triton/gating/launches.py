"""How the kernels of ``gate`` are launched for a number of tokens, and how they add.

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
"""Columns whose products a matrix unit adds. Not measured yet."""
STEP = 128
"""Columns of both factors that are in registers at a time, where each is one number."""


class Order(NamedTuple):
    """What the bits of a sum depend on.

    :ivar slice: columns of a slice.
    :ivar step: columns at a time of these.
    :ivar hidden_parts: bfloat16 numbers that a hidden state is the sum of; 0 means itself.
    :ivar weight_parts: likewise of a weight times the vectors of its column.
    """

    slice: int
    step: int
    hidden_parts: int
    weight_parts: int


class GateLaunch(NamedTuple):
    """How the logits of up to some number of tokens are made.

    :ivar tokens: most of them; ``None`` means any number.
    :ivar block_t: tokens a program.
    :ivar block_e: experts a program.
    :ivar num_warps: warps a program.
    :ivar split: a program takes one slice, and the kernel that routes adds them.
    :ivar stages: slices that are under way at a time, where a program takes all.
    """

    tokens: int | None
    block_t: int
    block_e: int
    num_warps: int
    split: bool = False
    stages: int = 2


WARP_GROUPS: tuple[GateLaunch, ...] = (
    GateLaunch(64, 16, 64, 4, split=True),
    GateLaunch(1024, 64, 64, 4, split=True),
    GateLaunch(4096, 64, 64, 8),
    GateLaunch(None, 64, 128, 8),
)
"""Where four warps multiply together, which takes 64 experts: all tiles get that instruction.

Not measured yet.
"""
ONE_TILE: tuple[GateLaunch, ...] = (
    GateLaunch(256, 32, 64, 4, split=True),
    GateLaunch(None, 32, 64, 4, stages=1),
)
"""Elsewhere: Triton picks an instruction by the tile, so there is one tile."""
HAVE_WARP_GROUPS = ((9, 0), (10, 0), (10, 3))


def launches_for(device: DeviceInfo) -> Sequence[GateLaunch]:
    """Return the launches by rising number of tokens; the last has no end."""
    return WARP_GROUPS if device.capability in HAVE_WARP_GROUPS else ONE_TILE


def order_of(problem: GateProblem, vectors: Sequence[torch.dtype]) -> Order:
    """Return the order for a problem whose columns have vectors of these dtypes.

    The kernels' first lines say why bfloat16 times bfloat16 takes two parts. A float16 number has
    11 bits, for which bfloat16 takes two; products of two float16 matrices are exact as they are.
    """
    is_plain = not vectors and not problem.float32_weight and problem.dtype != "float32"
    if is_plain:
        return Order(SLICE, STEP, 0, 0)
    hidden_parts = {"bfloat16": 0, "float16": 2, "float32": 3}[problem.dtype]
    of_two_bfloat16 = (
        problem.dtype == "bfloat16"
        and not problem.float32_weight
        and list(vectors) == [torch.bfloat16]
    )
    # More parts take more registers a column.
    step = STEP // 4 if hidden_parts else STEP // 2
    return Order(SLICE, step, hidden_parts, 2 if of_two_bfloat16 else 3)
