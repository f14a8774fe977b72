"""Compile the kernel that counts the slots of many tokens for Intel GPUs, as ``plan.py`` does.

The script prints the results as JSON.
"""

import dataclasses
import itertools
import json
import sys

import spirv
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from moe_routing_backends.triton.kernels import counts
from moe_routing_backends.triton.kernels.spec import kernel_spec
from moe_routing_backends.triton.runtime.xpu import in_sub_groups
from moe_routing_registry import RoutingProblem, RoutingSpec

TYPES = {
    "ids": "*i32", "expert_map": "*i64", "replica_count": "*i64", "counts": "*i64",
    "most_replicas": "i32", "T": "i32",
}  # fmt: skip
RENAMING = ("expert_map", "replica_count", "most_replicas")


def main():
    """Compile it for few experts and for many, with replicas and without."""
    spirv.without_a_device()
    kernel, lanes = counts.moe_routing_counts, counts.WARP_SIZE
    target = GPUTarget("xpu", spirv.B60 | {"has_bfloat16_conversions": False}, lanes)
    found = []
    cases = itertools.product(counts.LAUNCHES, ((128, RENAMING), (128, ()), (512, ())))
    for launch, (experts, absent) in cases:
        problem = RoutingProblem(
            spec=RoutingSpec(family="f", renormalize=True), num_experts=experts, topk=8,
            dtype="bfloat16", operands=frozenset({"counts", "replicas"}),
        )  # fmt: skip
        spec = dataclasses.replace(kernel_spec(problem), counted_columns=8)
        known = {"SPEC": spec, "PDL": False, **counts.constants(problem, launch)}
        known |= dict.fromkeys(absent)
        types = {name: "constexpr" if name in known else TYPES[name] for name in kernel.arg_names}
        options = in_sub_groups(make_backend(target).parse_options({}), launch.num_warps, lanes)
        options["enable_fp_fusion"] = False
        source = ASTSource(fn=kernel, signature=types, constexprs=known)
        binary = triton.compile(source, target=target, options=options)
        found.append(
            {
                "E": experts,
                "slots": launch.block,
                "kernel": kernel.fn.__name__,
                "invalid": spirv.judge(binary.asm["spv"]),
                "shared": binary.metadata.shared,
                **spirv.machine_code(binary.asm["spv"]),
            }
        )
    json.dump({"triton": triton.__version__, "cases": found}, sys.stdout)


if __name__ == "__main__":
    main()
