"""Compile the kernels of ``plan`` for Intel GPUs, with Triton-XPU and without hardware.

The script prints the results as JSON, as ``spirv.py`` does for routing.
"""

import json
import sys

import spirv
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from moe_routing.planning import DispatchPlan, PlanProblem
from moe_routing.planning.call import shapes
from moe_routing_backends.triton import BATTLEMAGE
from moe_routing_backends.triton.planning.planner import SUB_GROUP, TritonPlanner
from moe_routing_backends.triton.runtime.xpu import in_sub_groups

LAYOUTS = {
    "sorted": {},
    "blocks": {"layout": "blocks", "block": 64},
    "masked": {"layout": "masked", "drop": "last"},
}
TOKENS = (1, 64, 1024, 16384)
"""Numbers that reach one launch, two and three."""


def turns(problem):
    """Return the launches that ship for the problem, and the parts that its plans do not have."""
    capacity = None if problem.drop == "nothing" else 16
    planner, found = TritonPlanner(problem, BATTLEMAGE), {}
    for tokens in TOKENS:
        ids = torch.empty((tokens, problem.topk), dtype=torch.int32, device="meta")
        parts = dict(zip(DispatchPlan._fields, shapes(problem, tokens, capacity), strict=True))
        out = DispatchPlan(
            *(
                None if shape is None else torch.empty(shape, dtype=torch.int32, device="meta")
                for shape in parts.values()
            )
        )
        for turn in planner._work(ids, out, capacity).turns:
            found[turn.kernel, turn.constants, turn.num_warps] = turn
    return list(found.values()), {name for name, shape in parts.items() if shape is None}


def compiled(turn, absent):
    """Compile one kernel to SPIR-V."""
    names = turn.kernel.arg_names
    constants = dict(zip(names[-len(turn.constants) :], turn.constants, strict=True))
    known = constants | {name: None for name in absent if name in names}
    pointers = names[: len(turn.takes)]
    types = {name: "*i32" if name in pointers else "i32" for name in names}
    target = GPUTarget("xpu", spirv.B60 | {"has_bfloat16_conversions": False}, SUB_GROUP)
    options = in_sub_groups(make_backend(target).parse_options({}), turn.num_warps, SUB_GROUP)
    options["enable_fp_fusion"] = False
    source = ASTSource(
        fn=turn.kernel,
        signature=types | dict.fromkeys(known, "constexpr"),
        constexprs={(names.index(name),): value for name, value in known.items()},
    )
    return triton.compile(source, target=target, options=options)


def main():
    """Compile what ships for E = 128 in every layout."""
    spirv.without_a_device()
    found = []
    for layout, asked in LAYOUTS.items():
        launches, absent = turns(PlanProblem(num_experts=128, topk=8, **asked))
        for turn in launches:
            binary = compiled(turn, absent)
            found.append(
                {
                    "layout": layout,
                    "kernel": turn.kernel.fn.__name__,
                    "warps": turn.num_warps,
                    "invalid": spirv.judge(binary.asm["spv"]),
                    "shared": binary.metadata.shared,
                    **spirv.machine_code(binary.asm["spv"]),
                }
            )
    json.dump({"triton": triton.__version__, "cases": found}, sys.stdout)


if __name__ == "__main__":
    main()
