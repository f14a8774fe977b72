"""Compile the kernels of ``permute`` and ``combine`` for GPUs that are not here.

The script prints registers, spills, shared memory, waits and the widest accesses as JSON. A process
of its own: nothing must have set ``TRITON_INTERPRET``, and no driver is needed. Arguments: names of
targets.
"""

import json
import re
import sys
from itertools import product

import torch
import triton
from ahead_of_time import TARGETS, device_of, read_back
from triton.compiler import ASTSource

import moe_routing
from moe_routing.permutation import CombineProblem, PermuteProblem
from moe_routing.permutation.problem import GROUP
from moe_routing_backends.triton.permutation.mover import TritonCombine, TritonPermute

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}
CALLS = ((8, 2816), (64, 333))
"""Slots and columns: rows of whole vectors, and odd ones in the most slots."""
TOKENS = (1, 128)
"""Numbers that reach every launch that ships."""
WIDE = re.compile(
    r"\b(?:ld|st)\.global\S*v(?:4\.b32|2\.b64)|\b(?:global|buffer)_(?:load|store)_dwordx4"
)


def launches(device, topk, columns):
    """Yield every launch of a call: which, the kernel, its arguments and constants, its warps."""
    found = {}

    def keep(_, kernel, __, arguments, constants, warps, ___, *, pdl):
        types = [
            POINTERS[a.dtype] if isinstance(a, torch.Tensor) else a and "i32" for a in arguments
        ]
        found[kernel, tuple(types), constants, warps] = pdl

    for tokens in TOKENS:
        plan = moe_routing.plan(torch.zeros(tokens, topk, dtype=torch.int32), 1, backend="eager")
        places = tokens * topk
        hidden = torch.zeros(tokens, columns, dtype=torch.bfloat16)
        rows, weights = hidden.new_zeros(places, columns), torch.zeros(tokens, topk)
        values = torch.zeros(places, columns, dtype=torch.float8_e4m3fn)
        scales = torch.zeros(places, -(-columns // GROUP))
        move = TritonPermute(PermuteProblem(topk=topk, dtype="bfloat16"), device)
        quantize = TritonPermute(
            PermuteProblem(topk=topk, dtype="bfloat16", quantize="float8_e4m3fn"), device
        )
        add = TritonCombine(CombineProblem(topk=topk, dtype="bfloat16"), device)
        for kernel in (move, quantize, add):
            kernel._compiled.launch_and_keep = keep
        move(hidden, plan, rows)
        quantize(hidden, plan, values, scales=scales)
        add(rows, plan, weights, hidden)
        add.backward(hidden, rows, plan, weights, rows, weights)
    return found


def compiled(kernel, types, constants, options, target):
    """Compile one kernel to its last stage.

    Pointers that are not in the kernel's ``do_not_specialize`` are aligned to 16 bytes, as those of
    a launch are.
    """
    names = kernel.arg_names
    known = dict(zip(names[len(types) :], constants, strict=True))
    known |= {name: None for name, type_ in zip(names, types, strict=False) if type_ is None}
    annotated = {p.name: p.annotation_type for p in kernel.params if p.annotation_type}
    signature = (
        dict(zip(names, types, strict=False)) | annotated | dict.fromkeys(known, "constexpr")
    )
    attributes = {
        (p.num,): [["tt.divisibility", 16]]
        for p in kernel.params
        if str(signature[p.name]).startswith("*") and not p.do_not_specialize
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=known, attrs=attributes)
    return triton.compile(source, target=target, options=options)


def main(names):
    """Compile the cases for the targets named."""
    found = []
    for name, (topk, columns) in product(names, CALLS):
        target = TARGETS[name]
        found_here = launches(device_of(target), topk, columns)
        for (kernel, types, constants, warps), pdl in found_here.items():
            options = {"num_warps": warps, "enable_fp_fusion": False}
            options |= {"launch_pdl": True} if pdl else {}
            binary = compiled(kernel, types, constants, options, target)
            text = binary.asm["amdgcn" if target.backend == "hip" else "ptx"]
            case = {"target": name, "K": topk, "H": columns, "kernel": kernel.fn.__name__}
            wide = len(WIDE.findall(text))
            found.append(case | {"wide": wide} | read_back(binary, target))
    json.dump({"triton": triton.__version__, "cases": found}, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:] or list(TARGETS))
