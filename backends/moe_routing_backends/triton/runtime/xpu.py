"""Launch options for Intel's GPUs: the lanes of a sub-group, under the name that Triton-XPU takes.

A register is 64 bytes on Xe2 (Battlemage) and Xe-HPC (Data Center Max), one 32-bit value of each of
16 lanes, and a hardware thread has 128 of them (256 if half as many threads are resident). So a
sub-group of 16 leaves a lane 128 values, and one of 32 leaves it 64 and takes fewer instructions
for a row. Which launch takes which is in ``tables/xpu.json``; its shapes are those that spill no
register at 128.
"""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from typing import Any

SUB_GROUP = 16
"""Lanes of a sub-group where the launch names no number.

Such a launch was made for warps of 32 lanes, and gets twice as many warps.
"""
OPTIONS = ("warp_size", "threads_per_warp")
"""The launch option's name in Triton-XPU from 3.6, and before."""


def in_sub_groups(options: Any, num_warps: int, warp_size: int) -> dict[str, int]:  # noqa: ANN401 -- Triton's own dataclass
    """Return the launch options, under the names that the installed Triton knows.

    :param options: an instance of its options, as ``parse_options`` of its backend returns.
    :param num_warps: warps a program.
    :param warp_size: lanes of a warp, 16 or 32; 0 where the launch was made for a device whose
        warps have 32.
    :raises RuntimeError: it has neither of the names that are known.
    """
    names = {field.name for field in fields(options)}
    name = next((name for name in OPTIONS if name in names), None)
    if name is None:
        has = ", ".join(sorted(names))
        msg = f"this Triton-XPU's launch options have none of {', '.join(OPTIONS)}: {has}"
        raise RuntimeError(msg)
    if not warp_size:
        return {"num_warps": num_warps * 32 // SUB_GROUP, name: SUB_GROUP}
    return {"num_warps": num_warps, name: warp_size}


@cache
def launch_options(num_warps: int, warp_size: int) -> dict[str, int]:
    """Return the options of a launch on the current XPU."""
    from triton.compiler import make_backend
    from triton.runtime import driver

    return in_sub_groups(
        make_backend(driver.active.get_current_target()).parse_options({}), num_warps, warp_size
    )
