"""Tokens through torch.distributed's all-to-all: any backend of it, any ranks, with gradients.

This file stays free of torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_routing_registry import ANY, BackendSpec, RejectCode, Target, Verdict, hookimpl

if TYPE_CHECKING:
    from moe_routing.distributed import ExchangeProblem
    from moe_routing_registry import DeviceInfo

MOST_RANKS = 64
"""The slots of a plan: a token that goes once to each rank has a slot for each."""


def supports(problem: ExchangeProblem, _device: DeviceInfo) -> Verdict:
    """Accept ranks with tokens of their own."""
    if problem.shared_batch:
        return Verdict.no(
            RejectCode.GROUP,
            "exchanges the tokens of ranks that hold different ones; here every rank holds all",
        )
    if problem.reduce == "rank" and problem.ranks > MOST_RANKS:
        return Verdict.no(
            RejectCode.GROUP,
            f"sums on each of up to {MOST_RANKS} ranks, not {problem.ranks}",
            fix="pass reduce='none'",
        )
    return Verdict.yes()


def notes(problem: ExchangeProblem, _device: DeviceInfo) -> tuple[str, ...]:
    """Say whether the host waits, and what is sent."""
    sent = "a row for each expert" if problem.reduce == "none" else "a row for each rank"
    if problem.max_tokens:
        return (f"no host synchronisation: {sent}, padded to max_tokens={problem.max_tokens}",)
    return (f"one host synchronisation, for sizes: {sent}, without padding",)


@hookimpl
def moe_routing_backends() -> list[BackendSpec]:
    """Register the backends."""
    return [
        BackendSpec(
            name="all-to-all",
            factories={"exchange": "moe_routing_backends.all_to_all.exchange:build"},
            targets=(Target(ANY),),
            priority=50,
            supports=supports,
            notes=notes,
            gaps={"group": "where every rank holds the batch, an all-reduce moves fewer bytes"},
            summary="tokens between ranks through torch.distributed's all-to-all",
        )
    ]
