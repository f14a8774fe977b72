"""Compile the backward kernel for GPUs that are not here.

The script prints registers, spills and shared memory as JSON.

A process of its own: nothing must have set ``TRITON_INTERPRET``, and no driver is needed.
Arguments: names of targets.
"""

import json
import sys

import triton
from ahead_of_time import DEEPSEEK, GEMMA4, TARGETS, read_back
from triton.compiler import ASTSource

from moe_routing_backends.triton.kernels.backward import moe_routing_backward
from moe_routing_backends.triton.runtime.gradient import RUNTIME_ARGUMENTS, constants
from moe_routing_registry import RoutingProblem, RoutingSpec

CASES = [
    (GEMMA4, 128, 8, "bfloat16"),
    (RoutingSpec(family="softmax_topk"), 128, 8, "float32"),
    (DEEPSEEK, 256, 8, "float32"),
    (GEMMA4, 512, 10, "bfloat16"),
]


def compiled(spec, experts, k, dtype, target):
    """Compile the kernel to its last stage."""
    known, num_warps = constants(
        RoutingProblem(spec=spec, num_experts=experts, topk=k, dtype=dtype, training=True)
    )
    known |= {"ROW_STRIDE": experts, "EXPERT_STRIDE": 1}
    if not spec.per_expert_scale:
        known |= {"per_expert_scale": None, "grad_scale": None}
    logits = {"bfloat16": "*bf16", "float32": "*fp32"}[dtype]
    types = {
        "grad_weights": "*fp32", "logits": logits, "ids": "*i32", "per_expert_scale": "*fp32",
        "grad_logits": logits, "grad_scale": "*fp32", "T": "i32", "row_stride": "i64",
        "expert_stride": "i64",
    }  # fmt: skip
    signature = {
        name: "constexpr" if name in known else types[name]
        for name in moe_routing_backward.arg_names
    }
    assert list(signature).index("SPEC") == RUNTIME_ARGUMENTS
    aligned = [name for name in ("logits", "grad_logits", "grad_scale") if name not in known]
    attributes = {
        (moe_routing_backward.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned
    }
    source = ASTSource(
        fn=moe_routing_backward, signature=signature, constexprs=known, attrs=attributes
    )
    return triton.compile(
        source, target=target, options={"num_warps": num_warps, "enable_fp_fusion": False}
    )


def main():
    """Compile every case for the targets named."""
    found = []
    for name in sys.argv[1:] or TARGETS:
        for spec, experts, k, dtype in CASES:
            numbers = read_back(compiled(spec, experts, k, dtype, TARGETS[name]), TARGETS[name])
            found.append(
                {
                    "target": name,
                    "spec": spec.family,
                    "E": experts,
                    "K": k,
                    "dtype": dtype,
                    **numbers,
                }
            )
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
