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
    scores = problem.operation in ("route", "gate")
    return knows_score(problem, device) if scores else Verdict.yes()


def notes(problem: Any, device: DeviceInfo) -> tuple[str, ...]:  # noqa: ANN401 -- of any operation
    """Say in which order ``gate`` adds, and that its routing is a kernel of its own."""
    if problem.operation != "gate":
        return ()
    on_cpu = device.platform == "cpu"
    if not problem.invariant:
        dtype = "float32" if on_cpu else "float64"
        how = f"{dtype} sums, in an order that depends on the number of tokens"
    elif on_cpu:
        how = "float64 sums in one order, in about three times the time of invariant=False"
    else:
        how = "float64 sums in one order, term by term: invariant=False takes far less time"
    return (f"logits: {how}", "composed of two operations, the logits and route")


@hookimpl
def moe_routing_backends() -> list[BackendSpec]:
    """Register the backends."""
    return [
        BackendSpec(
            name="eager",
            factories={
                "route": "moe_routing_backends.eager.route:build",
                "gate": "moe_routing_backends.eager.gate:build",
                "plan": "moe_routing_backends.eager.plan:build",
                "permute": "moe_routing_backends.eager.permutation:build_permute",
                "combine": "moe_routing_backends.eager.permutation:build_combine",
                "balance": "moe_routing_backends.eager.balance:build",
            },
            targets=(Target(ANY),),
            operands=frozenset({"ids", "valid"}),
            priority=0,
            supports=supports,
            notes=notes,
            summary="plain PyTorch operations, on any device",
        )
    ]
