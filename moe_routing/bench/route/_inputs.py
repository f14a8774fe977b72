"""``Inputs``: the tensors that are routed, in as many sets as no cache holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

import moe_routing
from moe_routing import RoutingOutput
from moe_routing.bench._implementation import FEWEST_SETS, refuse_beyond_memory, sets_for

if TYPE_CHECKING:
    from moe_routing.bench._settings import Case
    from moe_routing_registry import DeviceInfo, RoutingSpec

_VOCABULARY = 4096
_FLOAT32_COPIES = 3
"""Of the logits, which plain PyTorch holds at once while it routes."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """Sets of logits, and outputs to write them to; all calls share the operands.

    :ivar logits: each ``[T, E]``, standard normal.
    :ivar outs: weights float32 and ids int32, ``[T, K + shared experts]``.
    :ivar bytes: that one call must move.
    """

    case: Case
    spec: RoutingSpec
    logits: list[torch.Tensor]
    outs: list[RoutingOutput]
    operands: dict[str, Any]
    bytes: int

    @property
    def given(self) -> list[torch.Tensor]:
        """The input of each set."""
        return self.logits


def check_memory(case: Case, device: DeviceInfo) -> None:
    """Refuse a case that the device's memory cannot hold, before anything of it is allocated.

    :raises ValueError: the case needs more memory than the device has.
    """
    spec = moe_routing.get_router(case.router).spec
    dtype: torch.dtype = getattr(torch, case.dtype)
    logits, outputs = case.num_experts * dtype.itemsize, (case.topk + spec.shared_experts) * 8
    routing = _FLOAT32_COPIES * case.num_experts * 4
    needed = case.tokens * (FEWEST_SETS * (logits + outputs) + routing)
    if spec.selection == "token_table":
        needed += _VOCABULARY * case.num_experts * 12  # random numbers and their order
    refuse_beyond_memory(case, device, needed)


def make(case: Case, device: torch.device, cache: int) -> Inputs:
    """Make the sets that ``sets_for`` counts."""
    spec = moe_routing.get_router(case.router).spec
    dtype: torch.dtype = getattr(torch, case.dtype)
    generator = torch.Generator(device).manual_seed(0)
    columns = case.topk + spec.shared_experts
    operands = _operands(spec, case, device, generator)
    moved = case.tokens * (case.num_experts * dtype.itemsize + columns * 8)
    moved += sum(value.nbytes for name, value in operands.items() if name != "expert_table")
    sets = sets_for(cache, moved)
    return Inputs(
        case,
        spec,
        [
            torch.randn(case.tokens, case.num_experts, device=device, generator=generator).to(dtype)
            for _ in range(sets)
        ],
        [
            RoutingOutput(
                torch.empty(case.tokens, columns, device=device),
                torch.empty(case.tokens, columns, device=device, dtype=torch.int32),
            )
            for _ in range(sets)
        ],
        operands,
        moved,
    )


def _operands(
    spec: RoutingSpec, case: Case, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    operands: dict[str, Any] = {}
    if spec.per_expert_scale:
        operands["per_expert_scale"] = (
            torch.rand(case.num_experts, device=device, generator=generator) + 0.5
        )
    if spec.needs_bias:
        operands["bias"] = torch.randn(case.num_experts, device=device, generator=generator) * 0.1
    if spec.selection == "token_table":
        order = torch.rand(
            _VOCABULARY, case.num_experts, device=device, generator=generator
        ).argsort(-1)
        operands["expert_table"] = order[:, : case.topk].contiguous()
        operands["token_ids"] = torch.randint(
            _VOCABULARY, (case.tokens,), device=device, generator=generator
        )
    return operands
