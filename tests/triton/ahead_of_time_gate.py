"""Compile the kernels of ``gate`` for GPUs that are not here.

The script prints registers, spills, shared memory, waits and matrix instructions as JSON. A process
of its own: nothing must have set ``TRITON_INTERPRET``, and no driver is needed. Arguments: names of
targets.
"""

import json
import re
import sys

import torch
import triton
from ahead_of_time import TARGETS, device_of, read_back
from ahead_of_time_permutation import compiled

from moe_routing.gating import GateProblem, Projection
from moe_routing.planning import PlanProblem
from moe_routing.planning.call import allocated, shapes
from moe_routing_backends.triton.gating.gate import TritonGate
from moe_routing_backends.triton.planning.planner import TritonPlanner
from moe_routing_registry import RoutingSpec

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
}
GEMMA4 = RoutingSpec(family="gemma4", renormalize=True, per_expert_scale=True)
MIXTRAL = RoutingSpec(family="mixtral", renormalize=True)
DEEPSEEK = RoutingSpec(
    family="grouped_sigmoid_bias", score="sigmoid", selection="scores_plus_bias", renormalize=True,
    renorm_epsilon=1e-20, scale=2.5, num_groups=8, topk_groups=4, group_sum=2,
)  # fmt: skip
PROBLEMS = (
    GateProblem(
        spec=GEMMA4, num_experts=128, topk=8, hidden_size=2816, dtype="bfloat16", norm="rms",
        input_scale=True,
    ),
    GateProblem(spec=MIXTRAL, num_experts=128, topk=8, hidden_size=2048, dtype="bfloat16"),
    GateProblem(
        spec=MIXTRAL, num_experts=128, topk=8, hidden_size=2048, dtype="bfloat16", norm="rms",
    ),
    GateProblem(
        spec=MIXTRAL, num_experts=128, topk=8, hidden_size=2048, dtype="float16", norm="rms",
        input_scale=True,
    ),
    GateProblem(
        spec=DEEPSEEK, num_experts=256, topk=8, hidden_size=7168, dtype="bfloat16",
        float32_weight=True,
    ),
    GateProblem(spec=DEEPSEEK, num_experts=256, topk=8, hidden_size=7168, dtype="bfloat16"),
    GateProblem(spec=MIXTRAL, num_experts=32, topk=4, hidden_size=2880, dtype="bfloat16",
        router_bias=True, logits_dtype="bfloat16",
    ),
    GateProblem(spec=MIXTRAL, num_experts=8, topk=2, hidden_size=300, dtype="float32"),
)  # fmt: skip
"""Gemma 4, Qwen3 and the same with norms, DeepSeek-V3 and the same with a bfloat16 weight, gpt-oss,
float32 rows of an odd size."""
ELSEWHERE = 1
"""Problems that are compiled for other targets than sm_90, which have fewer launches."""
SAID = ("TAKES", "BLOCK_E", "BLOCK_T")
"""Constants that are printed."""
TOKENS = (1, 30, 50, 150, 200, 700, 1000, 2000, 3000, 5000, 9000, 20000)
"""Numbers that reach every launch that ships."""
PLANNED = (1, 200, 1000, 3000)
"""Of these, numbers that reach every launch in which the kernels do a part of a plan."""
PLANS = (
    {}, {"layout": "blocks", "block": 64}, {"layout": "masked", "drop": "last"},
    {"num_experts": 512}, {"num_experts": 4096},
)  # fmt: skip
CAPACITY = 16
PLANS_OF = (PROBLEMS[0], PROBLEMS[4], PROBLEMS[6])
MATRIX = re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma_\w+|v_wmma_\w+)([\w.:]*)")
SHAPE = re.compile(r"m\d+n\d+k\d+")


def launches(device, problem):
    """Return every launch of a problem: the kernel, arguments, constants, warps; and options.

    Some of them plan too.
    """
    found = {}
    gate = TritonGate(problem, device, lambda *_, **__: None)

    def keep(_, kernel, __, arguments, constants, warps, *___, **given):
        types = [
            POINTERS[a.dtype] if isinstance(a, torch.Tensor) else None if a is None else "i32"
            for a in arguments
        ]
        options = {"launch_pdl": given["pdl"], "maxnreg": given.get("registers")}
        options = {name: option for name, option in options.items() if option}
        found[kernel, tuple(types), constants, warps] = options

    gate._compiled.launch_and_keep = keep
    dtype, E, H = getattr(torch, problem.dtype), problem.num_experts, problem.hidden_size
    weight = torch.zeros(E, H, dtype=getattr(torch, problem.weight_dtype))
    scale = torch.ones(E) if problem.spec.per_expert_scale else None
    for tokens in TOKENS:
        projection = Projection(
            torch.zeros(1, H, dtype=dtype).expand(tokens, H), weight,
            torch.zeros(E, dtype=dtype) if problem.router_bias else None, None,
            torch.ones(H, dtype=dtype) if problem.input_scale else None,
            1e-6 if problem.norm else None, H**-0.5 if problem.input_scale else 1.0,
        )  # fmt: skip
        bias = torch.zeros(E) if problem.spec.needs_bias else None
        operands = {"per_expert_scale": scale, "bias": bias}
        gate.routed(projection, None, **operands)
        for plan in PLANS if tokens in PLANNED and problem in PLANS_OF else ():
            planned = PlanProblem(**{"num_experts": E, "topk": problem.topk, **plan})
            planner = TritonPlanner(planned, device)
            planner._compiled.launch_and_keep = keep
            capacity = None if planned.drop == "nothing" else CAPACITY
            out = allocated(shapes(planned, tokens, capacity), torch.device("cpu"))
            gate.planned(projection, planner, out, capacity=capacity, **operands)
    return found


def instructions_of(text):
    """Return the matrix instructions of a kernel, but for the columns they have."""
    found = set()
    for name, rest in MATRIX.findall(text):
        shape = SHAPE.search(rest)
        found.add(f"{name} {re.sub('n[0-9]+', '', shape[0])}" if shape else name)
    return sorted(found)


def cases(names):
    """Yield every target and problem."""
    for name in names:
        for problem in PROBLEMS if name == "sm_90" else PROBLEMS[:ELSEWHERE]:
            yield name, problem


def main(names):
    """Compile the cases for the targets named."""
    found = []
    for name, problem in cases(names):
        target = TARGETS[name]
        for key, options in launches(device_of(target), problem).items():
            kernel, types, constants, warps = key
            options |= {"num_warps": warps, "enable_fp_fusion": False}
            binary = compiled(kernel, types, constants, options, target)
            text = binary.asm["amdgcn" if target.backend == "hip" else "ptx"]
            case = {"target": name, "problem": str(problem), "kernel": kernel.fn.__name__}
            known = dict(zip(kernel.arg_names, types, strict=False))
            case["reads_hidden"] = known.get("hidden") is not None
            case["adds_slices"] = known["partial"] is not None
            case["plans"] = any(known.get(name) for name in ("pair_counts", "order"))
            names_of = kernel.arg_names[len(types) :]
            said = {n: v for n, v in zip(names_of, constants, strict=True) if n in SAID}
            matrix = {"matrix": instructions_of(text)}
            found.append(case | said | matrix | read_back(binary, target))
    json.dump({"triton": triton.__version__, "cases": found}, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:] or list(TARGETS))
