"""Compare the compiled kernels before and after a change that renames or moves code.

    python tests/triton/machine_code.py before.json             # in the old tree
    python tests/triton/machine_code.py after.json before.json  # in the new tree

The second command names what differs, and its exit code is 1 if anything does.

Every case is compared as Triton IR, without names and locations, since the same IR compiles to the
same instructions; the launches that ship for a few problems are compared as machine code too,
without names, addresses and parameter offsets. No GPU is needed. With ``--ir`` only the IR is
compared.
"""

import hashlib
import itertools
import json
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import ahead_of_time as aot
import triton
from triton._C.libtriton import ir
from triton.compiler import ASTSource, make_backend

from moe_routing_backends.triton.kernels import supports
from moe_routing_backends.triton.kernels.backward import moe_routing_backward
from moe_routing_backends.triton.kernels.spec import Launch
from moe_routing_backends.triton.runtime import gradient
from moe_routing_registry import RoutingProblem, RoutingSpec

S = RoutingSpec
SPECS = [
    aot.GEMMA4,
    aot.DEEPSEEK,
    S(family="softmax_topk"),
    S(family="softmax_topk", logit_softcap=30.0, logit_multiplier=0.5),
    S(
        family="sigmoid_bias_topk",
        score="sigmoid",
        selection="scores_plus_bias",
        renormalize=True,
        scale=2.0,
    ),
    S(
        family="sqrt",
        score="sqrtsoftplus",
        selection="scores_plus_bias",
        renormalize=True,
        scale=1.5,
        shared_experts=1,
    ),
    S(
        family="softbias",
        score="softmax",
        selection="scores_plus_bias",
        renormalize=True,
        renorm_floor=1e-9,
    ),
    S(family="logitbias", score="sigmoid", selection="logits_plus_bias", zero_experts=2),
    S(family="sparsemixer", selection="sparsemixer"),
    S(family="hash", score="sqrtsoftplus", selection="token_table", renormalize=True),
    S(family="pergroup", num_groups=4, topk_per_group=True, renormalize=True),
    S(family="softgroups", num_groups=8, topk_groups=3, group_sum=1),
]
SIZES = [(64, 6), (128, 8), (160, 8), (256, 8), (512, 10)]
LAUNCHES = [
    Launch("cooperative", 1, 1, 1), Launch("cooperative", 4, 1, 4),
    Launch("thread_per_row", 32, 1, 1), Launch("thread_per_row", 8, 4, 1),
    Launch("filter", 16, 2, 1), Launch("filter", 4, 8, 1), Launch("block", 4, 8, 1),
    Launch("block", 2, 16, 1),
]  # fmt: skip


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def plain(text):
    """Return Triton IR without names and locations.

    Constants stand where they are used, not where they are defined.
    """
    text = re.sub(r" ?loc\(.*?\)+", "", text)
    text = re.sub(r"^(#loc.*)?\n", "", text, flags=re.MULTILINE)
    definition = r"^ *(%[A-Za-z_0-9.$-]+) = arith.constant (.*)\n"
    constants = dict(re.findall(definition, text, flags=re.MULTILINE))
    text = re.sub(definition, "", text, flags=re.MULTILINE)
    # A name may be defined again in another region, so numbers are given line by line, anew where a
    # line defines a name.
    numbers, count, lines = {}, itertools.count(), []
    for line in text.splitlines():
        defined = r"%[A-Za-z_0-9.$-]+" if "^bb" in line else r"(%[A-Za-z_0-9.$-]+)(?::\d+)? ="
        for name in re.findall(defined, line):
            numbers[name] = f"%{next(count)}"
        named = r"[%@][A-Za-z_0-9.$-]+"
        lines.append(
            re.sub(
                named,
                lambda m: constants.get(m[0]) or numbers.setdefault(m[0], f"%{next(count)}"),
                line,
            )
        )
    return "\n".join(lines)


def triton_ir(source, target, options):
    backend = make_backend(target)
    options = backend.parse_options(dict(options, **source.parse_options()))
    stages = {}
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    try:
        backend.add_stages(stages, options, source.language)
    except TypeError:
        backend.add_stages(stages, options)
    module = source.make_ir(
        target,
        options,
        backend.get_codegen_implementation(options),
        backend.get_module_map(),
        context,
    )
    return plain(str(stages["ttir"](module, {})))


def instructions(binary, target):
    """Return the instructions of a binary, one an item."""
    if target.backend == "hip":
        lines = re.findall(r"^\t([svdgb][a-z]*_.*)", binary.asm["amdgcn"], re.MULTILINE)
        return [line.partition(";")[0].rstrip() for line in lines]
    # Offsets of parameters and the kernel's own name, which returns from its subroutines carry.
    named = (
        re.sub(r"c\[0x0\]\[0x[0-9a-f]+\]", "c[parameter]", line.partition("/*")[0].rstrip())
        for line in aot.instructions(binary)
    )
    return [re.sub(r"`\(\w+\)", "`(kernel)", line) for line in named]


def ir_of(case):
    name, problem, launch, general = case
    try:
        if launch is None:
            source, options = backward_source(problem), {}
        else:
            source, options = aot.source_of(problem, launch, aot.TARGETS["sm_90"], general=general)
        return f"ir {name}", digest(triton_ir(source, aot.TARGETS["sm_90"], options))
    except Exception as error:  # noqa: BLE001
        return f"ir {name}", f"{type(error).__name__} {str(error)[:300]}"


def code_of(case):
    name, problem, launch, target = case
    target = aot.TARGETS[target]
    return name, digest("\n".join(instructions(aot.compiled(problem, launch, target), target)))


def backward_source(problem):
    constants, _ = gradient.constants(problem)
    spec = problem.spec
    known = {**constants, "ROW_STRIDE": problem.num_experts, "EXPERT_STRIDE": 1}
    if not spec.per_expert_scale:
        known |= dict.fromkeys(("per_expert_scale", "grad_scale"))
    logits = {"bfloat16": "*bf16", "float32": "*fp32"}[problem.dtype]
    types = {
        "grad_weights": "*fp32",
        "logits": logits,
        "ids": "*i32",
        "per_expert_scale": "*fp32",
        "grad_logits": logits,
        "grad_scale": "*fp32",
        "T": "i32",
        "row_stride": "i64",
        "expert_stride": "i64",
    }
    signature = {
        name: "constexpr" if name in known else types[name]
        for name in moe_routing_backward.arg_names
    }
    return ASTSource(fn=moe_routing_backward, signature=signature, constexprs=known, attrs={})


def ir_cases():
    for spec in SPECS:
        for experts, topk in SIZES:
            for dtype in ("bfloat16", "float32"):
                try:
                    problem = RoutingProblem(
                        spec=spec,
                        num_experts=experts,
                        topk=topk if spec.selection != "sparsemixer" else 2,
                        dtype=dtype,
                    )
                except ValueError:
                    continue
                if spec.selection != "token_table" and experts == 128:
                    yield f"backward {spec.family} {dtype}", problem, None, False
                for launch in LAUNCHES:
                    for general in (False, True):
                        if not supports(problem, launch) or (
                            general and (experts != 128 or dtype == "float32")
                        ):
                            continue
                        name = "general " if general else ""
                        name += f"{spec.family} {experts}/{topk} {dtype} {launch.variant}"
                        name += f" {launch.block_t} {launch.threads_per_row}"
                        yield name, problem, launch, general


def code_cases():
    for case, problem, launch in aot.cases(aot.TARGETS, aot.dtypes):
        yield " ".join(str(value) for value in case.values()), problem, launch, case["target"]


def main(out, against=None, *, ir_only=False):
    with ProcessPoolExecutor(2) as pool:
        found = dict(pool.map(ir_of, list(ir_cases()), chunksize=4))
        if not ir_only:
            found |= dict(pool.map(code_of, list(code_cases())))
    Path(out).write_text(json.dumps({"triton": triton.__version__, "code": found}, indent=1) + "\n")
    if against is None:
        return 0
    before = json.loads(Path(against).read_text())["code"]
    if ir_only:
        before = {k: v for k, v in before.items() if k.startswith("ir ")}
    differ = [name for name in sorted({*before, *found}) if before.get(name) != found.get(name)]
    sys.stdout.write("\n".join([f"{len(found)} kernels, {len(differ)} differ", *differ, ""]))
    return 1 if differ else 0


if __name__ == "__main__":
    paths = [a for a in sys.argv[1:] if a != "--ir"]
    sys.exit(main(*paths, ir_only="--ir" in sys.argv))
