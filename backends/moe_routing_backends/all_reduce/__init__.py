"""Sums of experts through torch.distributed's all-reduce, where every rank holds the batch.

This file stays free of torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_routing_registry import ANY, BackendSpec, RejectCode, Target, Verdict, hookimpl

if TYPE_CHECKING:
    from moe_routing.distributed import ExchangeProblem
    from moe_routing_registry import DeviceInfo


def supports(problem: ExchangeProblem, _device: DeviceInfo) -> Verdict:
    """Accept ranks that hold the same tokens, for sums that are made on each rank."""
    if not problem.shared_batch:
        return Verdict.no(
            RejectCode.GROUP,
            "is for ranks that all hold the same tokens",
            fix="pass shared_batch=True, if they do",
        )
    if problem.reduce != "rank":
        return Verdict.no(
            RejectCode.GROUP, "sums on each rank, then over ranks", fix="pass reduce='rank'"
        )
    return Verdict.yes()


@hookimpl
def moe_routing_backends() -> list[BackendSpec]:
    """Register the backends."""
    return [
        BackendSpec(
            name="all-reduce",
            factories={"exchange": "moe_routing_backends.all_reduce.exchange:build"},
            targets=(Target(ANY),),
            priority=50,
            supports=supports,
            gaps={"group": "without the other ranks' tokens there is nothing to sum"},
            summary="partial sums through torch.distributed's all-reduce; ranks share the batch",
        )
    ]
