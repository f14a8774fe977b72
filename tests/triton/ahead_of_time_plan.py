"""Compile the kernels of ``plan`` for GPUs that are not here.

The script prints registers, frames, spills and shared memory as JSON; its exit code is 1 if
anything spills.

A process of its own: nothing must have set ``TRITON_INTERPRET``, and no driver is needed.
Arguments: names of targets. A target is compiled for a few numbers of experts and of tokens;
``--all`` compiles all that a launch table has launches for, which takes ten minutes a target or
more: run it when the table of a target changes.
"""

import json
import sys
from itertools import product

import torch
import triton
from ahead_of_time import TARGETS, device_of, usage
from triton.compiler import ASTSource

from moe_routing.planning import DispatchPlan, PlanProblem
from moe_routing.planning.call import shapes
from moe_routing_backends.triton.planning.planner import TritonPlanner

EXPERTS = (64, 128, 256, 512, 4096)
LAYOUTS = {
    "sorted": {},
    "blocks": {"layout": "blocks", "block": 64},
    "masked": {"layout": "masked", "drop": "last"},
    "drops": {"drop": "last"},
}
K = 8
CAPACITY = 16
TOKENS = [2**power for power in range(18)]
"""Numbers of tokens that reach every launch that ships."""
FEW_TOKENS = [1, 64, 1024, 16384]
"""Numbers that reach launches of each kind."""
POINTERS = frozenset(
    {"partial", "within", "order", "inverse", "counts", "offsets", "block_experts", "num_dropped"}
)


def launches(problem, name, numbers):
    """Return the launches that ship for the problem and some numbers of tokens on a target."""
    planner = TritonPlanner(problem, device_of(TARGETS[name]))
    capacity = None if problem.drop == "nothing" else CAPACITY
    found = []
    for tokens in numbers:
        ids = torch.empty(
            (tokens, problem.topk), dtype=getattr(torch, problem.ids_dtype), device="meta"
        )
        parts = shapes(problem, tokens, capacity)
        out = DispatchPlan(
            *(
                None if s is None else torch.empty(s, dtype=torch.int32, device="meta")
                for s in parts
            )
        )
        for turn in planner._work(ids, out, capacity).turns:
            absent = tuple(
                kernel_name
                for kernel_name, part in (
                    ("block_experts", out.block_experts),
                    ("num_dropped", out.num_dropped),
                )
                if part is None and kernel_name in turn.kernel.arg_names
            )
            found.append((turn.kernel, absent, turn.constants, turn.num_warps))
    return list(dict.fromkeys(found))


def source_of(problem, kernel, absent, constants):
    """Return a kernel with its constants."""
    names = kernel.arg_names
    known = dict(zip(names[-len(constants) :], constants, strict=True)) | dict.fromkeys(absent)
    types = dict.fromkeys(POINTERS, "*i32") | {
        "ids": {"int32": "*i32", "int64": "*i64"}[problem.ids_dtype]
    }
    signature = {name: "constexpr" if name in known else types.get(name, "i32") for name in names}
    # No attributes: the kernels have every argument in ``do_not_specialize``.
    return ASTSource(fn=kernel, signature=signature, constexprs=known)


def compiled(problem, launch, target):
    """Compile one kernel to its last stage."""
    kernel, absent, constants, num_warps = launch
    pdl = constants[-1]
    options = {
        "num_warps": num_warps,
        "enable_fp_fusion": False,
        **({"launch_pdl": True} if pdl else {}),
    }
    return triton.compile(
        source_of(problem, kernel, absent, constants), target=target, options=options
    )


def shown(launch):
    """Name a launch by its kernel and constants: ``plan_scan 4096 in 4 warps``."""
    kernel, _, constants, num_warps = launch
    sizes = [str(int(constant)) for constant in constants[1:-1]]
    name = kernel.fn.__name__.removeprefix("moe_routing_")
    return f"{name} {' '.join(sizes)} in {num_warps} warps"


def every_size(_name):
    """Yield every number of experts in every layout, with all numbers of tokens."""
    for experts, layout in product(EXPERTS, LAYOUTS):
        yield experts, layout, TOKENS


def few_sizes(name):
    """Yield a number of experts for each layout, with two numbers of tokens.

    They take turns from layout to layout and from target to target.
    """
    for place, layout in enumerate(LAYOUTS, list(TARGETS).index(name)):
        yield EXPERTS[place % len(EXPERTS)], layout, FEW_TOKENS[place % 2 :: 2]


def cases(names, sizes):
    """Yield every case of the targets named, with its problem and its launch."""
    for name in names:
        for experts, layout, numbers in sizes(name):
            problem = PlanProblem(num_experts=experts, topk=K, **LAYOUTS[layout])
            for launch in launches(problem, name, numbers):
                case = {"target": name, "E": experts, "layout": layout, "kernel": shown(launch)}
                yield case, problem, launch


def main(names, sizes):
    """Compile the cases for the targets named; return whether anything spills."""
    found = []
    for case, problem, launch in cases(names, sizes):
        target = TARGETS[case["target"]]
        found.append(case | usage(compiled(problem, launch, target), target))
    json.dump({"triton": triton.__version__, "cases": found}, sys.stdout)
    return any(case["spills"] for case in found)


if __name__ == "__main__":
    every = "--all" in sys.argv
    named = [name for name in sys.argv[1:] if name != "--all"]
    sys.exit(main(named or list(TARGETS), every_size if every else few_sizes))
