"""Plain PyTorch: right on every device, fast on the CPU, and the last to be asked. This file stays free of torch."""

from __future__ import annotations

from moe_routing_registry import (
    ANY,
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
    """Accept everything that the fields of ``RoutingSpec`` can say."""
    if problem.spec.score not in SCORES:
        known = ", ".join(SCORES)
        return Verdict.no(RejectCode.FAMILY, f"knows the score functions {known}, not {problem.spec.score!r}")
    return Verdict.yes()


@hookimpl
def moe_routing_backends() -> list[BackendSpec]:
    """Hand in the card."""
    return [
        BackendSpec(
            name="eager",
            factory="moe_routing_backends.eager.route:build",
            targets=(Target(ANY),),
            priority=0,
            supports=supports,
            summary="plain PyTorch operations, on any device",
        )
    ]
