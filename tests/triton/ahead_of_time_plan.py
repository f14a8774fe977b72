"""Compile the kernels of ``plan`` for GPUs that are not here.

The script prints registers, spills and shared memory as JSON.

A process of its own: nothing must have set ``TRITON_INTERPRET``, and no driver is needed.
Arguments: names of targets. ``--all`` compiles all numbers of experts, layouts and launches, which
takes minutes a target.
"""

import json
import sys
from itertools import product

import torch
import triton
from ahead_of_time import TARGETS, device_of, read_back
from triton.compiler import ASTSource

from moe_routing.planning import DispatchPlan, PlanProblem
from moe_routing.planning.call import shapes
from moe_routing_backends.triton.planning.planner import TritonPlanner

EXPERTS = (64, 128, 256, 512, 4096)
FEW = {"experts": (128,), "layouts": ("sorted", "blocks")}
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


def cases(names, experts=EXPERTS, layouts=tuple(LAYOUTS), numbers=TOKENS):
    """Yield every case of the targets named, with its problem and its launch."""
    for name, num_experts, layout in product(names, experts, layouts):
        problem = PlanProblem(num_experts=num_experts, topk=K, **LAYOUTS[layout])
        for launch in launches(problem, name, numbers):
            case = {"target": name, "E": num_experts, "layout": layout, "kernel": shown(launch)}
            yield case, problem, launch


def main(names, **of):
    """Compile the cases for the targets named."""
    found = []
    for case, problem, launch in cases(names, **of):
        target = TARGETS[case["target"]]
        found.append(case | read_back(compiled(problem, launch, target), target))
    json.dump({"triton": triton.__version__, "cases": found}, sys.stdout)


if __name__ == "__main__":
    every = "--all" in sys.argv
    named = [name for name in sys.argv[1:] if name != "--all"]
    main(named or list(TARGETS), **({} if every else {**FEW, "numbers": FEW_TOKENS}))
