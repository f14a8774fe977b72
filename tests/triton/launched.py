"""Compare what the direct launch and Triton's own launcher hand to Triton's C function.

The script prints JSON.

A process of its own for one version of Triton, which is found first on PYTHONPATH. No driver is
needed: kernels are compiled for sm_90, Triton's own launcher is made for each, and in the place of
the C function stands one that notes its arguments.
"""

import json
import sys
from types import SimpleNamespace

import triton
from ahead_of_time import DEEPSEEK, GEMMA4, TARGETS, compiled
from ahead_of_time_backward import compiled as compiled_backward
from ahead_of_time_plan import cases as cases_of_plan
from ahead_of_time_plan import compiled as compiled_plan
from triton.backends.nvidia import driver

from moe_routing_backends.triton.kernels.spec import Launch
from moe_routing_backends.triton.runtime.launcher import launcher_of
from moe_routing_registry import RoutingProblem

CASES = [
    (GEMMA4, 128, 8, Launch("cooperative", 1, 1, 1), ()),
    (GEMMA4, 128, 8, Launch("thread_per_row", 16, 2, 1), ()),
    (DEEPSEEK, 256, 8, Launch("cooperative", 2, 1, 1), ()),
    (DEEPSEEK, 256, 8, Launch("block", 4, 8, 1), ("counts", "replicas")),
    (GEMMA4, 128, 8, Launch("weigh", 4, 1, 1), ("counts", "ids", "valid")),
]
"""Specs, E, K, launches and optional operands."""
PLANS = [(128, "sorted", [64, 16384]), (128, "drops", [1024]), (64, "blocks", [1])]
"""Experts, layout and numbers of tokens: each kernel of ``plan``, with all parts and without."""
BLOCKS, STREAM, FUNCTION = 7, 11, 13


def launcher(kernel, noted):
    """Make Triton's launcher of a kernel, as loading it on a device would."""
    note = lambda *arguments: noted.append(arguments)  # noqa: E731 -- the C function has no name either
    if hasattr(driver, "make_launcher"):  # 3.6 compiles a C function for each signature
        driver.compile_module_from_src = lambda **_source: SimpleNamespace(launch=note)
        driver.library_dirs = list
    else:  # later ones have one C function, and a C class that describes arguments to it
        driver.PyKernelArg = lambda **described: tuple(described.items())
        driver.ARG_CONSTEXPR, driver.ARG_KERNEL, driver.ARG_TUPLE = range(3)
        utils = SimpleNamespace(launch=note, build_signature_metadata=tuple)
        triton.runtime.driver.set_active(SimpleNamespace(utils=utils))
    return driver.CudaLauncher(kernel.src, kernel.metadata)


def compare(kernel):
    """Launch both ways, and compare what they hand over.

    Return also why the direct way is not taken.
    """
    noted = []
    run = launcher(kernel, noted)
    names = kernel.src.fn.arg_names
    constants = tuple(
        kernel.src.constants.get((place,)) for place in range(names.index("SPEC"), len(names))
    )
    arguments = tuple(
        None if (place,) in kernel.src.constants else 1000 + place
        for place in range(len(names) - len(constants))
    )
    loaded = SimpleNamespace(run=run, function=FUNCTION, packed_metadata=kernel.packed_metadata)
    ours, reason = launcher_of(loaded, constants)
    ours(BLOCKS, STREAM, arguments)
    hooks = (None, None, None)  # no launch metadata, and no hook before and after the launch
    run(BLOCKS, 1, 1, STREAM, FUNCTION, kernel.packed_metadata, *hooks, *arguments, *constants)
    return {
        "reason": reason,
        "same": len(noted) == 2 and noted[0] == noted[1],
        "handed": len(noted[0]),
    }


def main():
    """Compile and compare; return whether anything differs."""
    found = {}
    for spec, experts, k, launch, operands in CASES:
        for dtype in ("bfloat16", "float32"):
            problem = RoutingProblem(
                spec=spec, num_experts=experts, topk=k, dtype=dtype, operands=frozenset(operands)
            )
            kernel = compiled(problem, launch, TARGETS["sm_90"])
            found[f"{spec.family} {experts}/{k} {dtype} {launch.variant}"] = compare(kernel)
    for case, problem, launch in cases_of_plan(["sm_90"], lambda _target: PLANS):
        name = f"{case['E']} {case['layout']} {case['kernel']}"
        found[name] = compare(compiled_plan(problem, launch, TARGETS["sm_90"]))
    for spec, experts, k in ((GEMMA4, 128, 8), (DEEPSEEK, 256, 8)):
        kernel = compiled_backward(spec, experts, k, "bfloat16", TARGETS["sm_90"])
        found[f"{spec.family} {experts}/{k} backward"] = compare(kernel)
    json.dump({"triton": triton.__version__, "kernels": found}, sys.stdout)
    return any(kernel["reason"] or not kernel["same"] for kernel in found.values())


if __name__ == "__main__":
    sys.exit(main())
