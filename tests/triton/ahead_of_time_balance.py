"""Compile the kernels of ``balance`` for GPUs that are not here.

The script prints registers, spills, shared memory, waits and the widest accesses as JSON. A process
of its own: nothing must have set ``TRITON_INTERPRET``, and no driver is needed. Arguments: names of
targets.
"""

import json
import sys
from itertools import product

import torch
import triton
from ahead_of_time import TARGETS, device_of, read_back
from ahead_of_time_permutation import POINTERS, WIDE, compiled

from moe_routing.balancing.problem import BalanceProblem
from moe_routing_backends.triton.balancing.balancer import TritonBalance

KINDS = (
    ("softmax", "ids", 8),
    ("sigmoid", "ids", 64),
    ("sqrtsoftplus", "ids", 8),
    ("softmax", "best", 8),
    ("logsumexp", "", 0),
)
SIZES = ((128, "bfloat16"), (128, "float32"), (60, "bfloat16"), (61, "bfloat16"), (2048, "float32"))
"""Experts and dtypes: rows of whole vectors, of halves, odd ones, and as many experts as can be."""


def launches(device, kind, experts, dtype):
    """Yield both launches of a call: the kernel, its arguments and constants, its warps."""
    score, counts, topk = kind
    problem = BalanceProblem(
        score=score, num_experts=experts, dtype=dtype, counts=counts, topk=topk
    )
    found = []

    def keep(_, kernel, __, arguments, constants, warps, ___, *, pdl):
        numbers = iter(("i64", "i32", "i64", "i64"))
        types = [
            POINTERS[a.dtype] if isinstance(a, torch.Tensor) else a if a is None else next(numbers)
            for a in arguments
        ]
        found.append((kernel, types, constants, warps, pdl))

    logits = torch.zeros(1, 64, experts, dtype=getattr(torch, dtype))
    ids = torch.zeros(1, 64, topk, dtype=torch.int32) if counts == "ids" else None
    weights = torch.ones(1, 64, dtype=torch.float32 if counts == "best" else torch.bool)
    columns = (experts, experts) if counts else (1, 0)
    sums = torch.zeros(1, columns[0])
    out = torch.zeros(1, columns[1], dtype=torch.float32 if counts == "best" else torch.int64)
    kernel = TritonBalance(problem, device)
    kernel._compiled.launch_and_keep = keep
    kernel(logits, ids, weights, sums, out)
    kernel.backward(sums, logits, weights, logits)
    return found


def main(names):
    """Compile the cases for the targets named."""
    found = []
    for name, kind, (experts, dtype) in product(names, KINDS, SIZES):
        target = TARGETS[name]
        for kernel, types, constants, warps, pdl in launches(
            device_of(target), kind, experts, dtype
        ):
            options = {"num_warps": warps, "enable_fp_fusion": False}
            options |= {"launch_pdl": True} if pdl else {}
            binary = compiled(kernel, types, constants, options, target)
            text = binary.asm["amdgcn" if target.backend == "hip" else "ptx"]
            case = {"target": name, "kind": kind, "E": experts, "dtype": dtype}
            case |= {"kernel": kernel.fn.__name__, "wide": len(WIDE.findall(text))}
            found.append(case | read_back(binary, target))
    json.dump({"triton": triton.__version__, "cases": found}, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:] or list(TARGETS))
