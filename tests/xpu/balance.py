"""Compile the kernels of ``balance`` for Intel GPUs, as ``plan.py`` does for plans.

The script prints the results as JSON.
"""

import json
import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "triton"))

import ahead_of_time_balance as balance
import spirv
import triton
from ahead_of_time_permutation import compiled
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend

from moe_routing_backends.triton import BATTLEMAGE
from moe_routing_backends.triton.runtime.xpu import SUB_GROUP, in_sub_groups


def main():
    """Compile what ships for every kind of sums, and rows that begin at various multiples."""
    spirv.without_a_device()
    target = GPUTarget("xpu", spirv.B60 | {"has_bfloat16_conversions": False}, SUB_GROUP)
    found = []
    for kind, (experts, dtype) in product(balance.KINDS, balance.SIZES):
        for kernel, types, constants, warps, _ in balance.launches(
            BATTLEMAGE, kind, experts, dtype
        ):
            options = in_sub_groups(make_backend(target).parse_options({}), warps, SUB_GROUP)
            options["enable_fp_fusion"] = False
            binary = compiled(kernel, types, constants, options, target)
            found.append(
                {
                    "kind": kind,
                    "E": experts,
                    "dtype": dtype,
                    "kernel": kernel.fn.__name__,
                    "warps": warps,
                    "invalid": spirv.judge(binary.asm["spv"]),
                    "shared": binary.metadata.shared,
                    **spirv.machine_code(binary.asm["spv"]),
                }
            )
    json.dump({"triton": triton.__version__, "cases": found}, sys.stdout)


if __name__ == "__main__":
    main()
