"""How the kernels of ``gate`` are launched for a number of logits, and how they add.

What fixes the order of summation, ``Order``, is one for all launches of a problem on a device. A
launch chooses the tile of a program, and whether a program takes a slice, a group of slices or all.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moe_routing.gating import GateProblem
    from moe_routing_registry import DeviceInfo

SLICE = 256
"""Columns whose products a matrix unit adds.

Before programs took groups it was, up to 4,096 tokens, the fastest or within 5 % of it; 512 was up
to 20 % faster at 1,024 tokens, and 128 as much at 16,384. A problem has one for all numbers of
tokens, or bits would differ.
"""
SLICE_OF_SCALED = 128
"""The same where vectors multiply the hidden states, which takes longer a column."""
GROUPS = 4
"""The most groups of a row of up to 16,384 columns: so many programs can share it."""
MOST_OF_GROUP = 32
"""Partial sums that the kernel that routes adds without a loop, so slices of a group at most."""
STEP = 128
"""Columns of both factors that are in registers at a time, where that is one number or two."""


class Order(NamedTuple):
    """What the bits of a sum depend on.

    :ivar slice: columns of a slice.
    :ivar step: columns at a time of these.
    :ivar hidden_parts: bfloat16 numbers that a hidden state is the sum of; 0 means itself.
    :ivar weight_parts: likewise of a weight.
    :ivar scales_hidden: vectors of columns multiply the hidden states, not the weight.
    :ivar packed: instructions on pairs of bfloat16 compute the two parts of hidden states.
    """

    slice: int
    step: int
    hidden_parts: int
    weight_parts: int
    scales_hidden: bool = True
    packed: bool = False

    def slices_of(self, hidden_size: int) -> int:
        """Return the slices of a row."""
        return -(-hidden_size // self.slice)

    def group_of(self, hidden_size: int) -> int:
        """Return the slices of a group."""
        return min(-(-self.slices_of(hidden_size) // GROUPS), MOST_OF_GROUP)


Takes = Literal["slice", "group", "all"]


class GateLaunch(NamedTuple):
    """How some number of logits, tokens times experts, are made.

    :ivar logits: most of them; ``None`` means any number.
    :ivar block_t: tokens a program.
    :ivar block_e: experts a program.
    :ivar num_warps: warps a program.
    :ivar takes: what a program takes of a row's columns: a slice, a group of slices, or all. If it
        is not all, the kernel that routes adds the partial sums.
    :ivar stages: steps that are under way at a time, where a program takes several slices.
    :ivar step: columns at a time, in place of the order's. It counts only where nothing is in parts
        and there is no norm: the sums do not depend on it there.
    :ivar saves_registers: the assembler may save registers on CUDA, so that more programs fit on a
        multiprocessor. Then loads may wait for one another.
    """

    logits: int | None
    block_t: int
    block_e: int
    num_warps: int
    takes: Takes = "all"
    stages: int = 2
    step: int | None = None
    saves_registers: bool = False


FEW = (GateLaunch(32 * 128, 16, 64, 4, "slice"), GateLaunch(96 * 128, 32, 64, 4, "slice"))
PLAIN = (
    FEW[0],
    FEW[1]._replace(logits=128 * 128),
    GateLaunch(384 * 128, 16, 64, 4, "group", 4, 64, saves_registers=True),
    GateLaunch(768 * 128, 32, 64, 4, "group", 4, 64, saves_registers=True),
    GateLaunch(1536 * 128, 64, 64, 4, "group", 4, 64, saves_registers=True),
    GateLaunch(6144 * 128, 64, 128, 8, "group", 4, 64),
    GateLaunch(12288 * 128, 64, 128, 8, stages=4, step=64),
    GateLaunch(None, 128, 128, 8, stages=5, step=64),
)
"""On sm_90, where numbers are multiplied as they are.

In this table and the next five: tiles of 64 experts or more in four warps or more, all of which get
``wgmma``. Measured on H200s (`benchmarks/results/h200-2026-11-29-gate-launches.json`).
"""
FEW_EXPERTS = 128
PLAIN_OF_MANY = (
    FEW[0]._replace(block_e=128, num_warps=8),
    GateLaunch(128 * 128, 64, 64, 4, "slice"),
    PLAIN[2],
    *PLAIN[4:],
)
"""The same of more than ``FEW_EXPERTS``."""
NORMED = (*PLAIN[:-2], PLAIN[-2]._replace(logits=None))
"""Where the squares of such numbers are added up: larger tiles take too much shared memory."""
SCALED = (
    FEW[0],
    GateLaunch(768 * 128, 64, 64, 4, "slice"),
    GateLaunch(1024 * 128, 32, 128, 8, "group", 3),
    GateLaunch(4096 * 128, 64, 128, 8, "group", 3),
    GateLaunch(None, 64, 128, 8, stages=3),
)
"""Where vectors multiply the hidden states."""
PACKED = (
    *SCALED[:3],
    SCALED[3]._replace(logits=2048 * 128),
    GateLaunch(4096 * 128, 64, 128, 4, "group", 2),
    SCALED[4],
)
"""Where it is one vector, and both are bfloat16: a tile needs few registers, so two programs fit.

The dtype of the vector is known only at a call. With another one the row of 4 warps spills some.
"""
OF_FLOAT32 = (
    *FEW,
    GateLaunch(1024 * 128, 64, 64, 4, "slice"),
    GateLaunch(4096 * 128, 64, 128, 8, "group", 3),
    GateLaunch(None, 64, 128, 8, stages=3),
)
"""Where a factor is float32."""
MANY = ((128, 4096), (math.inf, 1024))
"""Most experts, and tokens from which PyTorch's product is used, where any order will do.

For 128 experts it takes 6 to 10 % less time at 4,096 tokens and as much at 16,384; for 256 experts
16 to 27 % less. Other numbers of experts were not measured.
"""
ONE_TILE: tuple[GateLaunch, ...] = (
    GateLaunch(256 * 128, 32, 32, 4, "slice"),
    GateLaunch(None, 32, 32, 4, stages=1),
)
"""Elsewhere: Triton picks an instruction by the tile, so there is one tile.

Of fewer than 64 experts, for which it does not pick ``tcgen05`` on compute capability 10.0: there
Triton 3.7 compiles some of these kernels to nothing.
"""


def many_tokens(num_experts: int) -> int:
    """Return from how many tokens PyTorch's product is used, where any order will do."""
    return next(tokens for experts, tokens in MANY if num_experts <= experts)


def launches_for(device: DeviceInfo, problem: GateProblem) -> Sequence[GateLaunch]:
    """Return the launches by rising number of logits; the last has no end."""
    if device.arch != "sm_90":
        return ONE_TILE
    if problem.float32_weight or problem.dtype == "float32":
        return OF_FLOAT32
    vectors = (problem.norm == "rms_weight") + problem.input_scale
    if vectors:
        return PACKED if vectors == 1 and problem.dtype == "bfloat16" else SCALED
    if problem.norm:
        return NORMED
    return PLAIN if problem.num_experts <= FEW_EXPERTS else PLAIN_OF_MANY


def order_of(problem: GateProblem, vectors: Sequence[torch.dtype], arch: str | None) -> Order:
    """Return the order on a device for a problem whose columns have vectors of these dtypes.

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
    if list(vectors) != [torch.bfloat16]:
        return Order(SLICE_OF_SCALED, STEP // 2, 3, 0)
    if arch == "sm_90":
        return Order(SLICE_OF_SCALED, STEP, 2, 0, packed=True)
    # Tiles of other devices have no registers for all columns of a slice.
    return Order(SLICE_OF_SCALED, STEP // 2, 2, 0)
