"""Plain PyTorch: right on every device, fast on the CPU, and the last to be asked.

This file stays free of torch.
"""

from __future__ import annotations

from moe_routing_registry import ANY, BackendSpec, Target, hookimpl, knows_score


@hookimpl
def moe_routing_backends() -> list[BackendSpec]:
    """Register the backends."""
    return [
        BackendSpec(
            name="eager",
            factories={"route": "moe_routing_backends.eager.route:build"},
            targets=(Target(ANY),),
            priority=0,
            supports=knows_score,
            summary="plain PyTorch operations, on any device",
        )
    ]
