"""Triton kernels for CUDA and ROCm, and for Intel's XPU: one code base, two backends.

This file stays free of torch and triton.

Where Triton interprets kernels (``TRITON_INTERPRET=1``), which it does on the CPU, the CPU is a
target of both, for those who name them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from moe_routing_registry import (
    BackendSpec,
    DeviceInfo,
    RejectCode,
    RoutingProblem,
    Target,
    Verdict,
    hookimpl,
    knows_score,
)
from moe_routing_registry.device import INTERPRETER, triton_interprets

MAX_EXPERTS = 2048
MAX_TOPK = 64
BEST_OF_A_GROUP = 2
UNRECORDED = frozenset({"token_table", "sparsemixer"})
"""Selections whose records the kernels do not read.

The one has a table where a record would be, the other weighs in rounds.
"""
DTYPES = ("bfloat16", "float16", "float32")
GFX = frozenset({"gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1101", "gfx1200", "gfx1201"})


HOPPER = DeviceInfo(type="cuda", platform="cuda", arch="sm_90", warp_sizes=(32,))
BATTLEMAGE = DeviceInfo(type="xpu", platform="xpu", arch="bmg-g21", warp_sizes=(16, 32))
"""In the interpreter the kernels are launched as on these."""


def supports(problem: Any, device: DeviceInfo) -> Verdict:  # noqa: ANN401 -- of any operation
    """Accept what the kernels take, where Triton can run them.

    A Triton for this platform must be installed, or interpret on this CPU.
    """
    verdict = _triton_runs(device)
    if verdict and problem.operation == "balance":
        return _fits(problem)
    if not verdict or problem.operation not in {"route", "gate"}:
        return verdict
    return _routes(problem if problem.operation == "route" else problem.routing)


def _triton_runs(device: DeviceInfo) -> Verdict:
    if triton_interprets() and device.platform != "cpu":
        reason = (
            f"{INTERPRETER} is set: Triton interprets kernels on the CPU, "
            f"and compiles none for {device.platform}"
        )
        return Verdict.no(RejectCode.TOOLCHAIN, reason, f"unset {INTERPRETER}")
    toolchain = device.toolchain("triton")
    if toolchain is None or not toolchain.usable:
        detail = toolchain.detail if toolchain else "triton is not installed"
        detail = detail or "the one installed does not"
        return Verdict.no(
            RejectCode.TOOLCHAIN,
            f"needs a Triton that compiles for {device.platform}: {detail}",
            toolchain.fix if toolchain and toolchain.fix else "pip install 'moe-routing[triton]'",
        )
    return Verdict.yes()


def _fits(problem: Any) -> Verdict:  # noqa: ANN401 -- of ``route`` or ``balance``
    """Accept dtypes and sizes of logits."""
    if problem.dtype not in DTYPES:
        return Verdict.no(
            RejectCode.DTYPE, f"takes logits of {', '.join(DTYPES)}, not {problem.dtype}"
        )
    if problem.num_experts > MAX_EXPERTS or problem.topk > MAX_TOPK:
        asked = f"E = {problem.num_experts} and K = {problem.topk}"
        return Verdict.no(
            RejectCode.SHAPE, f"takes E up to {MAX_EXPERTS} and K up to {MAX_TOPK}, not {asked}"
        )
    return Verdict.yes()


def _routes(problem: RoutingProblem) -> Verdict:
    fits = _fits(problem)
    if not fits:
        return fits
    if "ids" in problem.operands and problem.spec.selection in UNRECORDED:
        reason = f"replays no experts that {problem.spec.selection} selects"
        return Verdict.no(RejectCode.OPERANDS, reason)
    return knows_score(problem) and knows_group_scores(problem)


def knows_group_scores(problem: RoutingProblem) -> Verdict:
    """Accept the scores of groups that the kernels compute.

    These are the maximum and the sum of the best two, of what top-k looks at.
    """
    spec = problem.spec
    if not spec.grouped:
        return Verdict.yes()
    if spec.group_by != "selection":
        reason = f"judges groups by what top-k looks at, not by group_by={spec.group_by!r}"
    elif min(spec.group_sum, problem.num_experts // spec.num_groups) > BEST_OF_A_GROUP:
        reason = f"sums the best {BEST_OF_A_GROUP} of a group at most, not {spec.group_sum}"
    else:
        return Verdict.yes()
    return Verdict.no(RejectCode.FAMILY, reason)


def supports_xpu(problem: Any, device: DeviceInfo) -> Verdict:  # noqa: ANN401 -- likewise
    """Accept the same, on an Intel GPU whose sub-groups are those of the launch table."""
    if device.platform == "xpu" and not {16, 32} <= set(device.warp_sizes):
        has = ", ".join(map(str, device.warp_sizes)) or "none that torch knows of"
        return Verdict.no(
            RejectCode.ARCH, f"needs sub-groups of 16 and 32 lanes, the device has {has}"
        )
    return supports(problem, device)


def notes(
    problem: Any,  # noqa: ANN401 -- of any operation
    device: DeviceInfo,
    *,
    interpreted_as: DeviceInfo = HOPPER,
) -> tuple[str, ...]:
    """Say which launch parameters apply to the problem, and how they came about.

    On a CPU, say also that Triton interprets the kernels.
    """
    said = _launches(problem, interpreted_as if device.platform == "cpu" else device)
    if device.platform != "cpu":
        return said
    what = (
        "Triton's interpreter runs the kernels on the CPU, a program after another: "
        "to look into them, not for speed"
    )
    return (what, *said)


def _launches(problem: Any, device: DeviceInfo) -> tuple[str, ...]:  # noqa: ANN401 -- likewise
    from moe_routing_backends.triton.tuning import choose

    if problem.operation == "route":
        return (choose.describe_table(device, problem),)
    if problem.operation == "plan":
        return (choose.describe_plan_table(device, problem),)
    if problem.operation == "gate":
        return _sums(problem, device)
    return ()  # the others have no table


def _sums(problem: Any, device: DeviceInfo) -> tuple[str, ...]:  # noqa: ANN401 -- of ``gate``
    """Say in which order ``gate`` adds, and how many kernels do it."""
    from moe_routing_backends.triton.gating.gate import adds_in_any_order
    from moe_routing_backends.triton.gating.launches import launches_for, many_tokens
    from moe_routing_backends.triton.planning.kernels import bins
    from moe_routing_backends.triton.planning.launches import (
        FEWEST_COUNTED,
        MOST_COUNTED,
        WIDEST_BY_ROUTER,
    )
    from moe_routing_backends.triton.tuning import choose

    E = problem.num_experts
    launches = launches_for(device, problem)
    few = max(launch.logits or 0 for launch in launches if launch.takes != "all")
    if adds_in_any_order(problem, device):
        few = min(few, many_tokens(E) * E - 1)
        many = f"from {many_tokens(E)} tokens PyTorch's product, in any order"
    else:
        many = "one order for any number of tokens"
    K = problem.topk + problem.spec.shared_experts
    least, most = -(-FEWEST_COUNTED // K), min(few // E, MOST_COUNTED // K)
    counts = f", and counts pairs of {least} to {most}" if least <= most else ""
    plans = f"the second plans one token{counts}; else composed of two operations"
    if bins(E + problem.spec.shared_experts) > WIDEST_BY_ROUTER:
        plans = "composed of two operations"
    return (
        f"logits: float32 sums of slices, {many}",
        f"up to {few // E} tokens two kernels, the second of which adds and routes",
        f"with_plan: {plans}",
        choose.describe_table(device, problem.routing),
    )


@hookimpl
def moe_routing_backends() -> list[BackendSpec]:
    """Register the backends."""
    interpreter = (Target("cpu", explicit=True),) if triton_interprets() else ()
    operands = frozenset({"ids", "valid", "counts", "replicas"})
    return [
        BackendSpec(
            name="triton",
            factories={
                "route": "moe_routing_backends.triton.runtime.router:build",
                "plan": "moe_routing_backends.triton.planning.planner:build",
                "permute": "moe_routing_backends.triton.permutation.mover:build_permute",
                "combine": "moe_routing_backends.triton.permutation.mover:build_combine",
                "balance": "moe_routing_backends.triton.balancing.balancer:build",
                "gate": "moe_routing_backends.triton.gating.gate:build",
            },
            targets=(
                Target("cuda", min_capability=(8, 0)),
                Target("rocm", archs=GFX),
                *interpreter,
            ),
            priority=100,
            operands=operands,
            supports=supports,
            summary="one fused Triton kernel, on NVIDIA and AMD GPUs",
            notes=notes,
            tuners={
                "route": "moe_routing_backends.triton.tuning.tune:tune",
                "plan": "moe_routing_backends.triton.planning.tune:tune",
            },
        ),
        BackendSpec(
            name="triton-xpu",
            factories={
                "route": "moe_routing_backends.triton.runtime.router:build_for_xpu",
                "plan": "moe_routing_backends.triton.planning.planner:build_for_xpu",
                "permute": "moe_routing_backends.triton.permutation.mover:build_permute",
                "combine": "moe_routing_backends.triton.permutation.mover:build_combine",
                "balance": "moe_routing_backends.triton.balancing.balancer:build",
            },
            targets=(Target("xpu"), *interpreter),
            priority=100,
            operands=operands,
            supports=supports_xpu,
            summary="the same kernels on Intel GPUs, through Triton-XPU",
            notes=partial(notes, interpreted_as=BATTLEMAGE),
        ),
    ]
