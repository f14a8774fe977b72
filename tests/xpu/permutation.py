"""Compile the kernels of ``permute`` and ``combine`` for Intel GPUs, as ``plan.py`` does for plans.

The script prints the results as JSON.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "triton"))

import ahead_of_time_permutation as permutation
import spirv
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend

from moe_routing_backends.triton import BATTLEMAGE
from moe_routing_backends.triton.runtime.xpu import SUB_GROUP, in_sub_groups


def main():
    """Compile what ships for rows of whole vectors, and for odd ones."""
    spirv.without_a_device()
    target = GPUTarget("xpu", spirv.B60 | {"has_bfloat16_conversions": False}, SUB_GROUP)
    found = []
    for topk, columns in permutation.CALLS:
        launches = permutation.launches(BATTLEMAGE, topk, columns)
        for kernel, types, constants, warps in launches:
            options = in_sub_groups(make_backend(target).parse_options({}), warps, SUB_GROUP)
            options["enable_fp_fusion"] = False
            binary = permutation.compiled(kernel, types, constants, options, target)
            found.append(
                {
                    "K": topk,
                    "H": columns,
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
