"""Compile kernels with optional operands for a GPU that is not here: print spills as JSON.

A process of its own: nothing must have set ``TRITON_INTERPRET``, and no driver is needed. Argument:
the name of a target.
"""

import json
import sys

import triton
from ahead_of_time import PROBLEMS, TARGETS, compiled, device_of, launches, spec_of, usage
from triton.compiler import ASTSource

from moe_routing_backends.triton.kernels import counts
from moe_routing_backends.triton.tuning.choose import supports_pdl
from moe_routing_registry import RoutingProblem

OPERANDS = (("valid",), ("ids", "valid"), ("counts", "replicas"))


def counting_kernel(problem, launch, target):
    """Compile the kernel that counts the slots of many tokens, and renames them."""
    kernel, pdl = counts.moe_routing_counts, supports_pdl(device_of(target))
    known = {"SPEC": spec_of(problem), "PDL": pdl, **counts.constants(problem, launch)}
    types = {"ids": "*i32", "expert_map": "*i32", "replica_count": "*i32", "counts": "*i64"}
    types |= {"most_replicas": "i32", "T": "i32"}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    options = {"num_warps": launch.num_warps, **({"launch_pdl": True} if pdl else {})}
    source = ASTSource(fn=kernel, signature=signature, constexprs=known)
    return triton.compile(source, target=target, options=options)


def main(name):
    """Compile the launches for few tokens and for many."""
    found, target = {}, TARGETS[name]
    for spec, experts, topk in PROBLEMS[:2]:
        for operands in OPERANDS:
            problem = RoutingProblem(
                spec=spec, num_experts=experts, topk=topk, dtype="bfloat16",
                operands=frozenset(operands),
            )  # fmt: skip
            few, *_, many = launches(problem, name) * 2
            for launch in (few, many):
                used = usage(compiled(problem, launch, target), target)
                found[f"{problem}, {launch.variant} {launch.block_t}"] = used
            if "counts" in operands:
                for launch in counts.LAUNCHES:
                    used = usage(counting_kernel(problem, launch, target), target)
                    found[f"{problem}, apart {launch.block}"] = used
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
