"""Triton kernels for CUDA and ROCm. This file stays free of torch and triton."""

from __future__ import annotations

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

MAX_EXPERTS = 2048
MAX_TOPK = 64
DTYPES = ("bfloat16", "float16", "float32")
GFX = frozenset({"gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1101", "gfx1200", "gfx1201"})


def supports(problem: RoutingProblem, device: DeviceInfo) -> Verdict:
    """Accept what the kernels take, where a Triton for this platform is installed."""
    toolchain = device.toolchain("triton")
    if toolchain is None or not toolchain.usable:
        detail = toolchain.detail if toolchain else "triton is not installed"
        return Verdict.no(
            RejectCode.TOOLCHAIN,
            f"needs a Triton that compiles for {device.platform}: {detail or 'the one installed does not'}",
            toolchain.fix if toolchain and toolchain.fix else "pip install 'moe-routing[triton]'",
        )
    if problem.dtype not in DTYPES:
        return Verdict.no(RejectCode.DTYPE, f"takes logits of {', '.join(DTYPES)}, not {problem.dtype}")
    if problem.num_experts > MAX_EXPERTS or problem.topk > MAX_TOPK:
        asked = f"E = {problem.num_experts} and K = {problem.topk}"
        return Verdict.no(RejectCode.SHAPE, f"takes E up to {MAX_EXPERTS} and K up to {MAX_TOPK}, not {asked}")
    return knows_score(problem)


@hookimpl
def moe_routing_backends() -> list[BackendSpec]:
    """Hand in the card."""
    return [
        BackendSpec(
            name="triton",
            factory="moe_routing_backends.triton.launch:build",
            targets=(Target("cuda", min_capability=(8, 0)), Target("rocm", archs=GFX)),
            priority=100,
            supports=supports,
            summary="one fused Triton kernel, on NVIDIA and AMD GPUs",
        )
    ]
