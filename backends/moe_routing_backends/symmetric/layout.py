"""What is kept for what arrives, and what a call keeps of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing import DispatchPlan
    from moe_routing_backends.symmetric.exchange import Symmetric
    from moe_routing_backends.symmetric.memory import Memory

WEIGHT = 4
"""Bytes of an id, and of the widest weight."""


class Rows(NamedTuple):
    """Memory for rows of every rank.

    :ivar pitch: bytes from a row to the next; the same on every rank.
    """

    memory: Memory
    pitch: int


class Layout:
    """What is kept for calls of K slots.

    :ivar topk: K.
    :ivar placed: whether fewer places are kept than there can be rows.
    :ivar places: that a rank keeps for each other: of pairs, or with sums of tokens.
    :ivar slots: whose experts a place tells: 1, or with sums K.
    :ivar told: the experts of the places, and behind them the weights.
    :ivar rows: memory for rows, by what they are.
    :ivar order: unless ``placed``, the constants of the plan of what comes back: its order, counts,
        offsets, and how many were dropped.
    """

    def __init__(self, topk: int, transport: Symmetric) -> None:
        """Keep memory for the experts of what arrives; every rank does so at once."""
        sums, ranks, most = transport.sums, transport.ranks, transport.most
        self.topk = topk
        self.places, self.slots = (most, topk) if sums else (most * topk, 1)
        self.placed = 0 < transport.capacity < self.places
        if self.placed:
            self.places = transport.capacity
        self.arriving = ranks * self.places
        self.told = transport.allocated("ids", 2 * WEIGHT * self.arriving * self.slots)
        self.rows: dict[str, Rows] = {}
        of = ranks if sums else 1
        number = torch.arange(of * self.places, dtype=torch.int32, device=transport.device)
        # Of tokens, place t of rank r is of the pair t * ranks + r.
        order = number.view(self.places, of).t().contiguous()
        offsets = number.new_tensor([rank * self.places for rank in range(of + 1)])
        self.order = (order, torch.zeros_like(offsets[1:]), offsets, None, offsets.new_zeros(1))


class State(NamedTuple):
    """What the way back needs.

    :ivar plan: of what comes back: the place of each slot's row, or with sums of each rank's. Where
        places are ``placed``, of what is sent too.
    :ivar ranks: int32, likewise: the rank that has it, -1 if none.
    :ivar weights: of the slots, for sums that are made here; ``None`` where each rank made its own.
    """

    layout: Layout
    plan: DispatchPlan
    ranks: Tensor
    weights: Tensor | None

    @property
    def lost(self) -> Tensor:
        """Which tokens have a row that found no place: ``[T, 1]``."""
        found_none = (self.ranks >= 0) & (self.plan.inverse < 0)
        return found_none.any(dim=1, keepdim=True)
