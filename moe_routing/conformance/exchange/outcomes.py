"""Exchanging a case, and holding what comes out against the oracle."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from moe_routing.conformance.permutation.outcomes import must_have_bits, must_lie_between
from moe_routing.conformance.requirements import require

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing import DispatchPlan
    from moe_routing.conformance.exchange.cases import World
    from moe_routing.distributed import ExpertParallel


class Exchanged(NamedTuple):
    """What a case came to on this rank."""

    rows: Tensor
    scales: Tensor | None
    plan: DispatchPlan
    result: Tensor


def dispatched(world: World, ep: ExpertParallel) -> tuple[Tensor, Tensor | None, DispatchPlan]:
    """Dispatch this rank's tokens."""
    hidden, ids, weights, scales = world.mine
    rows, plan = ep.dispatch(hidden, ids, weights, scales=scales)
    if isinstance(rows, torch.Tensor):
        return rows, None, plan
    return rows.rows, rows.scales, plan


def exchanged(world: World, ep: ExpertParallel) -> Exchanged:
    """Exchange this rank's tokens there and back."""
    rows, scales, plan = dispatched(world, ep)
    return Exchanged(rows, scales, plan, ep.combine(world.computed(rows, plan)))


def must_be_right(world: World, made: Exchanged, what: str = "") -> None:
    """Hold everything against the oracle."""
    front = f"{what}: " if what else ""
    rows_must_be_right(world, made.rows, made.scales, made.plan, front)
    require(
        made.result.dtype == world.result_dtype,
        f"{front}results: expected dtype {world.result_dtype}, got {made.result.dtype}",
    )
    require(
        made.result.device == world.device,
        f"{front}results: expected device {world.device}, got {made.result.device}",
    )
    must_lie_between(f"{front}results", made.result, world.right())


def rows_must_be_right(
    world: World, rows: Tensor, scales: Tensor | None, plan: DispatchPlan, front: str = ""
) -> None:
    """Hold rows and their plan against the oracle."""
    arrivals = world.arrivals()
    counts = [sum(one.expert == expert for one in arrivals) for expert in world.experts]
    got = plan.counts.tolist()
    require(
        got[: len(counts)] == counts and not any(got[len(counts) :]),
        f"{front}plan.counts: expected {counts}, got {got}",
    )
    number = len(arrivals)
    require(len(rows) >= number, f"{front}rows: expected {number} or more, got {len(rows)}")
    for name, made, part in (("rows", rows, 0), ("scales", scales, 3)):
        of = [drawn for one in world.drawn if (drawn := one[part]) is not None]
        require(bool(of) == (made is not None), f"{front}{name}: expected some, or none")
        if made is not None:
            chosen = [of[one.source][one.token] for one in arrivals]
            right = torch.stack(chosen) if chosen else of[0][:0]
            must_have_bits(f"{front}{name}", made[:number], right)
