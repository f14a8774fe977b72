"""Compile the kernels for Intel GPUs, with Triton-XPU and without hardware.

The script prints the results as JSON.

A process of its own, in which ``triton`` is Triton-XPU. Every launch that the XPU's table gives for
some problems, and the backward kernel, at sub-groups of 16 and 32 lanes, for an Arc Pro B60
(bmg-g21) to SPIR-V, which ``spirv-val`` judges; where ``ocloc`` is installed, Intel's compiler goes
on with what ships to machine code for pvc (a Data Center Max, whose registers are like the B60's;
the ocloc of Debian 12 knows no bmg) and says how many registers it spilled.

Two things stand in spirv-val's way, and are changed in what it is shown: Triton-XPU 3.3 writes a
single element as a vector of one, which SPIR-V forbids and Intel's compiler takes, so vectors of
one become scalars; and Debian's spirv-val does not know Intel's bfloat16 conversion, so Triton-XPU
is told that the device has none, and writes shifts instead.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1] / "triton"))

import triton
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from moe_routing_backends.triton.kernels import VARIANTS, constants
from moe_routing_backends.triton.kernels.backward import moe_routing_backward
from moe_routing_backends.triton.kernels.spec import Launch
from moe_routing_backends.triton.runtime import gradient
from moe_routing_backends.triton.runtime.xpu import SUB_GROUP, in_sub_groups
from moe_routing_backends.triton.tuning.choose import SHIPPED
from moe_routing_backends.triton.tuning.table import FALLBACK, parse
from moe_routing_registry import RoutingProblem, RoutingSpec

B60 = {
    "architecture": 0x500400400,
    "sub_group_sizes": [16, 32],
    "has_fp64": True,
    "max_work_group_size": 1024,
}
GEMMA4 = RoutingSpec(family="gemma4", renormalize=True, per_expert_scale=True)
SOFTMAX = RoutingSpec(family="softmax_topk")
SIGMOID_BIAS = RoutingSpec(
    family="sigmoid_bias_topk", score="sigmoid", selection="scores_plus_bias", renormalize=True
)
DEEPSEEK_V3 = RoutingSpec(
    family="grouped_sigmoid_bias", score="sigmoid", selection="scores_plus_bias", renormalize=True,
    renorm_epsilon=1e-20, scale=2.5, num_groups=8, topk_groups=4, group_sum=2,
)  # fmt: skip
PHIMOE = RoutingSpec(family="sparsemixer", selection="sparsemixer")
PROBLEMS = [
    (GEMMA4, 128, 8), (GEMMA4, 512, 10), (SOFTMAX, 128, 8), (SIGMOID_BIAS, 128, 8),
    (SIGMOID_BIAS, 512, 10), (DEEPSEEK_V3, 256, 8), (PHIMOE, 16, 2),
]  # fmt: skip
BACKWARD = [(GEMMA4, 128, 8), (SOFTMAX, 512, 10), (DEEPSEEK_V3, 256, 8)]
TYPES = {"bfloat16": "*bf16", "float32": "*fp32"}


def at_the_other_size(launch):
    """Return the launch with sub-groups of 16 lanes for 32, or 32 for 16, and as many warps."""
    other = 48 - launch.warp_size
    rows = (
        launch.block_t
        if launch.variant == "cooperative"
        else launch.block_t * other // launch.warp_size
    )
    return Launch(launch.variant, rows, launch.threads_per_row, launch.num_warps, other)


def cases():
    """Yield what to compile: the problem, a launch, and whether it ships so.

    Each launch comes in every dtype that it ships for, and once at the other sub-group size: the
    dtypes take turns from problem to problem.
    """
    table = parse((SHIPPED / "xpu.json").read_text(), "xpu.json")
    for place, (spec, experts, k) in enumerate(PROBLEMS):
        others = set()
        for dtype in list(TYPES)[:: (-1) ** place]:
            problem = RoutingProblem(spec=spec, num_experts=experts, topk=k, dtype=dtype)
            for launch in dict.fromkeys(
                [*(step.launch for step in table.steps(problem)), FALLBACK]
            ):
                yield problem, launch, True
                if not launch.warp_size:
                    continue
                other = at_the_other_size(launch)
                if other not in others:
                    yield problem, other, False
                others.add(other)
    for place, (spec, experts, k) in enumerate(BACKWARD):
        for turn, dtype in enumerate(TYPES):
            problem = RoutingProblem(
                spec=spec, num_experts=experts, topk=k, dtype=dtype, training=True
            )
            warps = gradient.constants(problem)[1]
            yield problem, Launch("backward", 1, 1, warps), True
            if turn == place % 2:
                yield problem, Launch("backward", 1, 1, warps, 32), False


def source_of(problem, launch):
    """Return the kernel with its constants, specialised as the launcher has it."""
    spec, values = problem.spec, TYPES[problem.dtype]
    strides = {"ROW_STRIDE": problem.num_experts, "EXPERT_STRIDE": 1}
    types = dict.fromkeys(("T", "valid", "vocabulary"), "i32") | dict.fromkeys(
        ("row_stride", "expert_stride"), "i64"
    )
    if launch.variant in VARIANTS:
        kernel, known = VARIANTS[launch.variant].kernel, constants(problem, launch)
        known |= {"VALID_ON_DEVICE": False, "PDL": False}
        known |= dict.fromkeys(
            (
                "token_ids", "expert_table", "num_valid_tokens", "expert_map", "counts",
                "replica_count", "most_replicas",
            )
        )  # fmt: skip
        types |= {
            "logits": values,
            "weights": "*fp32",
            "ids": "*i32",
            "per_expert_scale": "*fp32",
            "bias": "*fp32",
        }
        aligned = ("logits", "weights", "ids")
    else:
        kernel, (known, _) = moe_routing_backward, gradient.constants(problem)
        types |= {"grad_weights": "*fp32", "logits": values, "ids": "*i32", "grad_logits": values}
        types |= {"per_expert_scale": "*fp32", "grad_scale": "*fp32"}
        aligned = ("logits", "grad_logits")
    absent = [] if spec.per_expert_scale else ["per_expert_scale", "grad_scale"]
    known |= strides | dict.fromkeys(absent if spec.needs_bias else [*absent, "bias"])
    known = {name: value for name, value in known.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in known else types[name] for name in kernel.arg_names}
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    return ASTSource(fn=kernel, signature=signature, constexprs=known, attrs=attributes)


def compiled(problem, launch):
    """Compile one kernel to SPIR-V."""
    target = GPUTarget("xpu", B60 | {"has_bfloat16_conversions": False}, 32)
    options = in_sub_groups(
        make_backend(target).parse_options({}), launch.num_warps, launch.warp_size
    )
    options["enable_fp_fusion"] = False
    binary = triton.compile(source_of(problem, launch), target=target, options=options)
    assert binary.metadata.threads_per_warp == (launch.warp_size or SUB_GROUP)
    return binary


def scalars(llir):
    """Turn vectors of one element into scalars, in LLVM's text.

    An instruction that took the element out or put it in becomes a move.
    """
    moved = re.sub(r"extractelement (<1 x (\w+)>) (\S+), i64 0", r"bitcast \2 \3 to \2", llir)
    moved = re.sub(
        r"insertelement <1 x (\w+)> (?:poison|undef), \1 (\S+), i64 0",
        r"bitcast \1 \2 to \1",
        moved,
    )
    constant = r"(?:<|splat \()\w+ ([^\s,<>)]+)[>)]"
    lines = (
        re.sub(constant, r"\1", line) if "<1 x " in line else line for line in moved.splitlines()
    )
    return re.sub(r"<1 x (\w+)>", r"\1", "\n".join(lines))


def without_a_device():
    """Have Triton-XPU compile where neither SYCL nor a GPU is.

    Name the architecture, and show spirv-val scalars.
    """
    xpu = backends["intel"].compiler
    # It builds a SYCL program to ask for the name of the architecture's number.
    known = xpu.__init__.__globals__
    known["compile_module_from_src"] = lambda *_, **__: SimpleNamespace(
        parse_device_arch=lambda _: "bmg"
    )
    to_spirv = xpu.make_spv
    xpu.make_spv = staticmethod(lambda llir, *rest: to_spirv(scalars(llir), *rest))


def machine_code(spirv):
    """Compile on for pvc, and return the numbers of instructions and spilled registers.

    Return nothing where there is no ocloc.
    """
    ocloc = shutil.which("ocloc")
    if ocloc is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.spv").write_bytes(spirv)
        done = subprocess.run(
            [ocloc, "compile", "-file", "kernel.spv", "-spirv_input", "-device", "pvc"],
            check=True, capture_output=True, text=True, cwd=folder,
            env=os.environ | {"IGC_ShaderDumpEnable": "1", "IGC_DumpToCustomDir": f"{folder}/dump"},
        )  # fmt: skip
        assembly = next(Path(folder, "dump").glob("*_simd*.asm")).read_text()
    spilled = re.search(r"spilled around (\d+)", done.stdout + done.stderr)
    return {
        "instructions": int(re.search(r"^//\.instCount (\d+)", assembly, re.MULTILINE)[1]),
        "spills": int(spilled[1]) if spilled else 0,
    }


def judge(spirv):
    """Return what spirv-val says against a module, or an empty text."""
    done = subprocess.run(
        [shutil.which("spirv-val"), "-"], check=False, input=spirv, capture_output=True
    )
    return (done.stdout + done.stderr).decode().strip() if done.returncode else ""


def main():
    """Compile every ``of``-th case, beginning with the ``first``-th."""
    first, of = map(int, sys.argv[1:])
    without_a_device()
    found = []
    for problem, launch, ships in list(cases())[first::of]:
        binary = compiled(problem, launch)
        tile = f" {launch.block_t}x{launch.threads_per_row}" if launch.variant in VARIANTS else ""
        found.append(
            {
                "problem": f"{problem.spec.family} {problem.num_experts}/{problem.topk}",
                "dtype": problem.dtype,
                "kernel": f"{launch.variant}{tile}",
                "sub_group": launch.warp_size or SUB_GROUP,
                "ships": ships,
                "invalid": judge(binary.asm["spv"]),
                "shared": binary.metadata.shared,
                **(machine_code(binary.asm["spv"]) if ships else {}),
            }
        )
    json.dump({"triton": triton.__version__, "cases": found}, sys.stdout)


if __name__ == "__main__":
    main()
