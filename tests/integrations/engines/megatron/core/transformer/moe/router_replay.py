"""The replay of megatron-core 0.16, megatron/core/transformer/moe/router_replay.py: signatures.

It records and replays as the docstrings there say; its process-wide lists are left out.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

TopK = Callable[..., tuple[Tensor, Tensor]]


class RouterReplay:
    """Record what the next calls select, or replay the targets where there are any."""

    def __init__(self) -> None:
        self.targets: list[Tensor] = []
        self.recorded: list[Tensor] = []

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: TopK | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return values and ids ``[T, K]``, of the function or of the next target."""
        if self.targets:
            ids = self.targets.pop(0)
            return scores.gather(1, ids), ids
        assert default_compute_topk is not None
        values, ids = default_compute_topk(
            scores, topk, num_groups=num_groups, group_topk=group_topk
        )
        self.recorded.append(ids)
        return values, ids
