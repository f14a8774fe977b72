"""The plain formula through ``torch.compile``: for every accelerator without kernels of its own.

This file stays free of torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_routing_registry import ACCELERATOR, BackendSpec, Target, Verdict, hookimpl, knows_score

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
            name="torch-compile",
            factories={
                "route": "moe_routing_backends.torch_compile.compile:build",
                "plan": "moe_routing_backends.torch_compile.plan:build",
                "permute": "moe_routing_backends.torch_compile.permutation:build_permute",
                "combine": "moe_routing_backends.torch_compile.permutation:build_combine",
            },
            targets=(Target(ACCELERATOR), Target("cpu", explicit=True)),
            priority=50,
            supports=supports,
            summary=(
                "the plain formula through torch.compile, on any accelerator; on the CPU when named"
            ),
        )
    ]
