"""Compile kernels that read records and masks for a GPU that is not here: print spills as JSON.

A process of its own: nothing must have set ``TRITON_INTERPRET``, and no driver is needed. Argument:
the name of a target.
"""

import json
import sys

from ahead_of_time import PROBLEMS, TARGETS, compiled, launches, usage

from moe_routing_registry import RoutingProblem

OPERANDS = (("valid",), ("ids", "valid"))


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
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
