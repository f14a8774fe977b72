"""The plain formula through ``torch.compile``: for every accelerator without kernels of its own. Free of torch."""

from __future__ import annotations

from moe_routing_registry import (
    ACCELERATOR,
    SCORES,
    BackendSpec,
    DeviceInfo,
    RejectCode,
    RoutingProblem,
    Target,
    Verdict,
    hookimpl,
)


def supports(problem: RoutingProblem, _device: DeviceInfo) -> Verdict:
    """Accept everything that the fields of ``RoutingSpec`` can say; whether a compiler is there, compiling shows."""
    if problem.spec.score not in SCORES:
        known = ", ".join(SCORES)
        return Verdict.no(RejectCode.FAMILY, f"knows the score functions {known}, not {problem.spec.score!r}")
    return Verdict.yes()


@hookimpl
def moe_routing_backends() -> list[BackendSpec]:
    """Hand in the card."""
    return [
        BackendSpec(
            name="torch-compile",
            factory="moe_routing_backends.torch_compile.compile:build",
            targets=(Target(ACCELERATOR), Target("cpu", explicit=True)),
            priority=50,
            supports=supports,
            summary="the plain formula through torch.compile, on any accelerator; on the CPU when named",
        )
    ]
