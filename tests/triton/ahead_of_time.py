"""Compile the kernels for GPUs that are not here.

The script prints registers, frames, spills and shared memory as JSON.

A process of its own: nothing must have set ``TRITON_INTERPRET``, and no driver is needed.
Arguments: names of targets. A target is compiled for every size, but most for one dtype a size;
``--write`` compiles every case, and keeps what it found as the table that a test holds the kernels
to.
"""

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moe_routing_backends.triton.kernels import OF_LAUNCHES, constants
from moe_routing_backends.triton.kernels.spec import ANY_ROWS, RUNTIME_ARGUMENTS, kernel_spec
from moe_routing_backends.triton.tuning.choose import shipped, supports_pdl
from moe_routing_registry import DeviceInfo, RoutingProblem, RoutingSpec

TABLE = Path(__file__).with_suffix(".json")
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
GEMMA4 = RoutingSpec(family="gemma4", renormalize=True, per_expert_scale=True)
DEEPSEEK = RoutingSpec(
    family="grouped_sigmoid_bias", score="sigmoid", selection="scores_plus_bias", renormalize=True,
    renorm_epsilon=1e-20, scale=2.5, num_groups=8, topk_groups=4, group_sum=2,
)  # fmt: skip
PROBLEMS = [(GEMMA4, 128, 8), (DEEPSEEK, 256, 8), (GEMMA4, 512, 10)]
DTYPES = ("bfloat16", "float32")


def device_of(target):
    """Describe a device of the target as probing one would."""
    platform, arch = {"cuda": ("cuda", f"sm_{target.arch}"), "hip": ("rocm", target.arch)}[
        target.backend
    ]
    return DeviceInfo(type="cuda", platform=platform, arch=arch, warp_sizes=(target.warp_size,))


def launches(problem, name):
    """Return every launch that ships for the problem on a target."""
    return list(
        dict.fromkeys(step.launch for step in shipped(device_of(TARGETS[name])).steps(problem))
    )


def shown(launch, target):
    """Name a launch by its rows for 32 threads.

    So launches that are derived from one another share a line of the table.
    """
    rows = (
        launch.block_t
        if launch.variant == "cooperative"
        else launch.block_t * 32 // target.warp_size
    )
    return f"{launch.variant} {rows}x{launch.threads_per_row}" + (
        f" in {launch.num_warps} warps" if launch.num_warps > 1 else ""
    )


def source_of(problem, launch, target, *, general=False):
    """Return a kernel with its constants, and its launch options.

    :param general: rows may be any distance apart, padding is counted on the device, and experts
        are mapped.

    A problem with optional operands brings them.
    """
    spec, experts, dtype = problem.spec, problem.num_experts, problem.dtype
    kernel = OF_LAUNCHES[launch.variant].kernel
    pdl = supports_pdl(device_of(target))
    masked, replayed = "valid" in problem.operands, "ids" in problem.operands
    absent = {
        "token_ids": spec.selection != "token_table",
        "expert_table": spec.selection != "token_table" and not replayed,
        "num_valid_tokens": not general and not masked,
        "expert_map": not general and "replicas" not in problem.operands,
        "counts": "counts" not in problem.operands,
        "replica_count": "replicas" not in problem.operands,
        "most_replicas": "replicas" not in problem.operands,
        "per_expert_scale": not spec.per_expert_scale,
        "bias": not spec.needs_bias,
    }
    known = {
        **constants(problem, launch),
        "ROW_STRIDE": 0 if general else experts,
        "EXPERT_STRIDE": 0 if general and launch.variant in ANY_ROWS else 1,
        "VALID_ON_DEVICE": general or masked,
        "PDL": pdl,
        "SPEC": spec_of(problem),
        **{name: None for name, is_absent in absent.items() if is_absent},
    }
    types = dict.fromkeys(("weights", "per_expert_scale", "bias"), "*fp32") | {
        "logits": {"bfloat16": "*bf16", "float32": "*fp32"}[dtype], "ids": "*i32",
        "token_ids": "*i64", "expert_table": "*i16" if replayed else "*i64",
        "num_valid_tokens": "*i1" if masked else "*i32",
        "expert_map": "*i32", "counts": "*i64", "replica_count": "*i32",
        "most_replicas": "i32", "T": "i32", "valid": "i32", "row_stride": "i64",
        "expert_stride": "i64", "vocabulary": "i32",
    }  # fmt: skip
    signature = {name: "constexpr" if name in known else types[name] for name in kernel.arg_names}
    assert list(signature).index("SPEC") == RUNTIME_ARGUMENTS
    attributes = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name in ("logits", "weights", "ids")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=known, attrs=attributes)
    options = {
        "num_warps": launch.num_warps,
        "enable_fp_fusion": False,
        **({"launch_pdl": True} if pdl else {}),
    }
    return source, options


def spec_of(problem):
    """Return the constant of a kernel, which counts if the problem has counts."""
    counts = "counts" in problem.operands
    return dataclasses.replace(kernel_spec(problem), counted_columns=problem.topk if counts else 0)


def compiled(problem, launch, target):
    """Compile one kernel to its last stage."""
    source, options = source_of(problem, launch, target)
    return triton.compile(source, target=target, options=options)


def usage(binary, target):
    """Return what a binary needs of its device.

    A spill is a load or store of local memory, on AMD a register that has a place there. A frame is
    the local memory, in bytes: a kernel may have one and never touch it.
    """
    if target.backend == "hip":
        names = {
            "registers": "vgpr_count",
            "frame": "private_segment_fixed_size",
            "spills": "vgpr_spill_count",
            "shared": "group_segment_fixed_size",
        }
        text = binary.asm["amdgcn"]
        return {key: int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for key, name in names.items()}
    text = said_of(binary, "cuobjdump", "-res-usage")
    frame = int(re.search(r"STACK:(\d+)", text)[1])
    touches = re.compile(r"\b(STL|LDL)\b")
    return {
        "registers": int(re.search(r"REG:(\d+)", text)[1]),
        "frame": frame,
        # Without a frame there is nothing to touch: most kernels need not be disassembled.
        "spills": sum(bool(touches.search(line)) for line in instructions(binary)) if frame else 0,
        "shared": binary.metadata.shared,
    }


def said_of(binary, tool, *options):
    """Return what a tool of Triton's package prints of a binary for NVIDIA."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        return subprocess.run(
            [Path(triton.__file__).parent / "backends/nvidia/bin" / tool, *options, file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout


def instructions(binary):
    """Disassemble a binary for NVIDIA."""
    # Without the analysis of data flow, which these lines do not need.
    code = said_of(binary, "nvdisasm", "--print-code", "--no-dataflow")
    return re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(.*)", code, re.MULTILINE)


def read_back(binary, target):
    """Return what a binary needs, and what it consists of."""
    if target.backend == "hip":
        text = binary.asm["amdgcn"]
        return usage(binary, target) | {
            "occupancy": int(re.search(r"; Occupancy: (\d+)", text)[1]),
            "instructions": len(re.findall(r"^\t[svdgb][a-z]*_", text, re.MULTILINE)),
        }
    lines = instructions(binary)
    return usage(binary, target) | {
        "instructions": sum("NOP" not in line for line in lines),
        "waits": waits(lines),
        "starts": starts(lines),
    }


def waits(lines):
    """Say when machine code waits for the previous kernels.

    It waits before it touches memory, ``first``; after loads from the second cache and nothing
    else, ``coherent``; after anything else, ``late``; or ``never``.
    """
    touches = [
        (number, bool(re.search(r"\bLDG\b.*STRONG\.GPU", line)))
        for number, line in enumerate(lines)
        if re.search(r"\b(LDG|STG|RED|ATOM)", line)
    ]
    found = [number for number, line in enumerate(lines) if "ACQBULK" in line]
    if not found:
        return "never"
    before = [is_coherent for number, is_coherent in touches if number < found[0]]
    return "first" if not before else "coherent" if all(before) else "late"


def starts(lines):
    """Say when machine code lets the next kernel start: after its own wait, before it, or never."""
    waited = [number for number, line in enumerate(lines) if "ACQBULK" in line]
    lets = [number for number, line in enumerate(lines) if "PREEXIT" in line]
    return "never" if not lets else "after" if waited and waited[-1] < lets[0] else "before"


def dtypes(name, place):
    """Return the dtypes that a target is compiled for at a size.

    They take turns from size to size and from target to target.

    So a size in each dtype is compiled for one of the three targets that ship the same filters, and
    for one of AMD's, which ship the same rows. The rows that sm_80 ships no other NVIDIA target
    does: it is compiled for both dtypes.
    """
    turn = list(TARGETS).index(name) + place
    return DTYPES if name == "sm_80" else DTYPES[turn % 2 :][:1]


def cases(names, dtypes):
    """Yield every case of the targets named, with its problem and its launch."""
    for name, (place, (spec, experts, k)) in product(names, enumerate(PROBLEMS)):
        for dtype in dtypes(name, place):
            problem = RoutingProblem(spec=spec, num_experts=experts, topk=k, dtype=dtype)
            for launch in launches(problem, name):
                kernel = shown(launch, TARGETS[name])
                case = {
                    "target": name,
                    "spec": spec.family,
                    "E": experts,
                    "K": k,
                    "dtype": dtype,
                    "kernel": kernel,
                }
                yield case, problem, launch


def every_dtype(name, place):  # noqa: ARG001 -- called as ``dtypes``
    """Return both dtypes."""
    return DTYPES


def found_for(names, dtypes):
    """Compile the cases of the targets named."""
    return [
        case
        | read_back(compiled(problem, launch, TARGETS[case["target"]]), TARGETS[case["target"]])
        for case, problem, launch in cases(names, dtypes)
    ]


def write():
    """Keep the table."""
    lines = ",\n".join("  " + json.dumps(case) for case in found_for(TARGETS, every_dtype))
    TABLE.write_text(f'{{\n "triton": "{triton.__version__}",\n "cases": [\n{lines}\n ]\n}}\n')


def main(names):
    """Print what was found for the targets named, and what ships for them, compiled or not."""
    ships = [case for case, _, _ in cases(names, every_dtype)]
    json.dump(
        {"triton": triton.__version__, "ships": ships, "cases": found_for(names, dtypes)},
        sys.stdout,
    )


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        write()
    else:
        main(sys.argv[1:] or list(TARGETS))
