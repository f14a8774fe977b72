"""Plain PyTorch: right on every device, fast on the CPU, and the last to be asked.

This file stays free of torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_routing_registry import ANY, BackendSpec, Target, Verdict, hookimpl, knows_score

if TYPE_CHECKING:
    from moe_routing_registry import DeviceInfo


def supports(problem: Any, device: DeviceInfo) -> Verdict:  # noqa: ANN401 -- of any operation
    """Accept everything but score functions that no built-in backend knows."""
    return knows_score(problem, device) if problem.operation == "route" else Verdict.yes()


@hookimpl
def moe_routing_backends() -> list[BackendSpec]:
    """Register the backends."""
    return [
        BackendSpec(
            name="eager",
            factories={
                "route": "moe_routing_backends.eager.route:build",
                "plan": "moe_routing_backends.eager.plan:build",
                "permute": "moe_routing_backends.eager.permutation:build_permute",
                "combine": "moe_routing_backends.eager.permutation:build_combine",
            },
            targets=(Target(ANY),),
            priority=0,
            supports=supports,
            summary="plain PyTorch operations, on any device",
        )
    ]
