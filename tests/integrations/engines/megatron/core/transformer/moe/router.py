"""The patch point of megatron-core 0.16, megatron/core/transformer/moe/router.py.

Its ``TopKRouter.routing`` calls the function by this module's name of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.core.transformer.moe.router_replay import RouterReplay
    from torch import Tensor


def topk_routing_with_score_function(
    logits: Tensor,
    topk: int,
    use_pre_softmax: bool = False,
    num_groups: int | None = None,
    group_topk: int | None = None,
    scaling_factor: float | None = None,
    score_function: str = "softmax",
    expert_bias: Tensor | None = None,
    fused: bool = False,
    router_replay: RouterReplay | None = None,
) -> tuple[Tensor, Tensor]:
    """Return probabilities and map ``[T, E]``."""
    raise NotImplementedError
