"""The plain formula through ``torch.compile``: for every accelerator without kernels of its own.

This file stays free of torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_routing_registry import (
    ACCELERATOR,
    BackendSpec,
    RejectCode,
    Target,
    Verdict,
    hookimpl,
    knows_score,
)

if TYPE_CHECKING:
    from moe_routing_registry import DeviceInfo


def supports(problem: Any, device: DeviceInfo) -> Verdict:  # noqa: ANN401 -- of any operation
    """Accept everything but score functions that no built-in backend knows.

    And but sums in one order: PyTorch's product has its own for each number of tokens.
    """
    if problem.operation not in ("route", "gate"):
        return Verdict.yes()
    if problem.operation == "gate" and problem.invariant:
        return Verdict.no(
            RejectCode.INVARIANCE,
            "adds in an order that depends on the number of tokens",
            fix="pass invariant=False",
        )
    return knows_score(problem, device)


def notes(problem: Any, _device: DeviceInfo) -> tuple[str, ...]:  # noqa: ANN401 -- of any operation
    """Say in which order ``gate`` adds, and that its routing is a kernel of its own."""
    if problem.operation != "gate":
        return ()
    return (
        "logits: sums in an order that depends on the number of tokens",
        "composed of two operations, the logits and route",
    )


@hookimpl
def moe_routing_backends() -> list[BackendSpec]:
    """Register the backends."""
    return [
        BackendSpec(
            name="torch-compile",
            factories={
                "route": "moe_routing_backends.torch_compile.compile:build",
                "gate": "moe_routing_backends.torch_compile.gate:build",
                "plan": "moe_routing_backends.torch_compile.plan:build",
                "permute": "moe_routing_backends.torch_compile.permutation:build_permute",
                "combine": "moe_routing_backends.torch_compile.permutation:build_combine",
                "balance": "moe_routing_backends.torch_compile.balance:build",
            },
            operands=frozenset({"ids", "valid"}),
            targets=(Target(ACCELERATOR), Target("cpu", explicit=True)),
            priority=50,
            supports=supports,
            notes=notes,
            gaps={"invariance": "PyTorch's product adds in an order for each number of tokens"},
            summary=(
                "the plain formula through torch.compile, on any accelerator; on the CPU when named"
            ),
        )
    ]
