"""Megatron-Core 0.16: ``TopKRouter`` routes, trains and replays through moe_routing."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from megatron.core.transformer.moe import router

import moe_routing

if TYPE_CHECKING:
    from megatron.core.transformer.moe.router_replay import RouterReplay
    from torch import Tensor

theirs = router.topk_routing_with_score_function


def topk_routing_with_score_function(  # noqa: PLR0913, PLR0917 -- theirs
    logits: Tensor,
    topk: int,
    use_pre_softmax: bool = False,  # noqa: FBT001, FBT002 -- likewise
    num_groups: int | None = None,
    group_topk: int | None = None,
    scaling_factor: float | None = None,
    score_function: str = "softmax",
    expert_bias: Tensor | None = None,
    fused: bool = False,  # noqa: FBT001, FBT002 -- likewise
    router_replay: RouterReplay | None = None,
) -> tuple[Tensor, Tensor]:
    """Return probabilities, in the logits' dtype, and the routing map, both ``[T, E]``."""
    if fused:
        msg = (
            "fused: expected False (moe_router_fusion asks for another library's kernel), got True"
        )
        raise ValueError(msg)
    if expert_bias is not None and score_function != "sigmoid":
        msg = f"expert_bias: expected None with score_function {score_function!r}, got a tensor"
        raise ValueError(msg)
    spec = _spec(
        score_function, topk, use_pre_softmax, num_groups, group_topk, scaling_factor,
        expert_bias is not None,
    )  # fmt: skip
    routed: moe_routing.RoutingOutput | None = None

    def select(*_: object, **__: object) -> tuple[Tensor, Tensor]:
        nonlocal routed
        routed = _router(spec)(logits, topk, bias=expert_bias, ids_dtype=torch.int64)
        return routed

    if router_replay is None:
        select()
    else:
        # It selects by the function, and keeps the ids, or brings ids of its own.
        _, ids = router_replay.get_replay_topk(
            logits.detach(), topk, num_groups, group_topk, select
        )
        if routed is None:
            ids = ids.to(logits.device)
            routed = _router(spec)(logits, topk, bias=expert_bias, ids=ids, ids_dtype=torch.int64)
    assert routed is not None  # noqa: S101 -- for mypy, which does not look into `select`
    probs, routing_map = moe_routing.dense(*routed, logits.shape[1])
    return probs.to(logits.dtype), routing_map


@cache
def _router(spec: moe_routing.RoutingSpec) -> moe_routing.Router:
    return moe_routing.get_router(spec)


@cache
def _spec(  # noqa: PLR0913, PLR0917 -- what the maths depends on
    score: str,
    topk: int,
    before_selection: bool,  # noqa: FBT001 -- likewise
    num_groups: int | None,
    group_topk: int | None,
    scaling_factor: float | None,
    biased: bool,  # noqa: FBT001 -- likewise
) -> moe_routing.RoutingSpec:
    if score not in ("softmax", "sigmoid"):
        msg = f"score_function: expected 'softmax' or 'sigmoid', got {score!r}"
        raise ValueError(msg)
    if group_topk and group_topk > topk:
        msg = f"group_topk: expected at most topk ({topk}), got {group_topk}"
        raise ValueError(msg)
    of_scores = score == "sigmoid" or before_selection
    best = topk // group_topk if group_topk else 1
    return moe_routing.RoutingSpec(
        family=f"megatron_{score}",
        score=score,
        selection="scores_plus_bias" if biased else "logits",
        renormalize=topk > 1 if score == "sigmoid" else not before_selection,
        renorm_epsilon=1e-20 if score == "sigmoid" and topk > 1 else 0.0,
        scale=scaling_factor or 1.0,
        num_groups=num_groups or 1 if group_topk else 1,
        topk_groups=group_topk or 1,
        group_sum=best,
        # The best single score is that of the highest logit.
        group_by="scores" if of_scores and not biased and best > 1 else "selection",
    )


def install() -> None:
    """Let every ``TopKRouter`` of this process route through moe_routing."""
    router.topk_routing_with_score_function = topk_routing_with_score_function


def uninstall() -> None:
    """Let them route as they did."""
    router.topk_routing_with_score_function = theirs
