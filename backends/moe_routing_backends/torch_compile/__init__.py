"""The plain formula through ``torch.compile``: for every accelerator without kernels of its own.

This file stays free of torch.
"""

from __future__ import annotations

from moe_routing_registry import ACCELERATOR, BackendSpec, Target, hookimpl, knows_score


@hookimpl
def moe_routing_backends() -> list[BackendSpec]:
    """Register the backends."""
    return [
        BackendSpec(
            name="torch-compile",
            factories={"route": "moe_routing_backends.torch_compile.compile:build"},
            targets=(Target(ACCELERATOR), Target("cpu", explicit=True)),
            priority=50,
            supports=knows_score,
            summary=(
                "the plain formula through torch.compile, on any accelerator; on the CPU when named"
            ),
        )
    ]
