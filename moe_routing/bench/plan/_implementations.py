"""What plans and can be timed: a backend, or what people write without a library."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

import moe_routing
from moe_routing import DispatchPlan
from moe_routing._registry import registry
from moe_routing.bench._implementation import Implementation
from moe_routing.formula.plan import places
from moe_routing_registry import Request

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.bench._plan_settings import PlanCase
    from moe_routing.bench.plan._inputs import Inputs
    from moe_routing_registry import ResolutionReport


def explain(case: PlanCase, device: str, backend: str | None) -> ResolutionReport:
    """Report which backend the case gets on the device, or whether this one can have it.

    :raises UnknownNameError: no such backend.
    """
    if backend is not None:
        registry().check_names(Request(backend=backend, asked_by="argument"))
    return moe_routing.explain(case.problem, device=device, backend=backend)


def backend(name: str, inputs: Inputs) -> Implementation:
    """Plan through a backend."""
    num_experts, block = inputs.case.num_experts, inputs.case.block

    def call(ids: Tensor) -> DispatchPlan:
        return moe_routing.plan(ids, num_experts, block=block, backend=name)

    def into(ids: Tensor, out: DispatchPlan) -> DispatchPlan:
        return moe_routing.plan(ids, num_experts, block=block, backend=name, out=out)

    return Implementation(name, True, call, into)  # noqa: FBT003 -- a field of a tuple


def comparison(name: str, inputs: Inputs) -> Implementation:
    """Plan as people write it in PyTorch."""
    function = by_sort_int32 if name == "sort-int32" else by_sort
    call = partial(function, num_experts=inputs.case.num_experts, block=inputs.case.block)
    not_captured = "bincount waits for the device: see mode call"
    return Implementation(name, False, call, not_captured=not_captured)  # noqa: FBT003 -- likewise


def by_sort(ids: Tensor, num_experts: int, block: int | None = None) -> DispatchPlan:
    """Plan by a stable sort, bincount, a cumulative sum and a scatter.

    It knows neither padding nor other ranks' ids. The results are int64, as PyTorch returns them.

    >>> by_sort(torch.tensor([[1, 0], [1, 2]]), 3).order.tolist()
    [1, 0, 2, 3]
    """
    flat = ids.reshape(-1)
    experts, order = torch.sort(flat, stable=True)
    counts = torch.bincount(flat, minlength=num_experts)
    every = torch.arange(len(order), device=ids.device)
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    if block is None:
        inverse = torch.empty_like(order).scatter_(0, order, every)
        return DispatchPlan(order, inverse.view(ids.shape), counts, starts)
    blocks = (counts + block - 1) // block
    ends = blocks.cumsum(0)
    offsets = torch.nn.functional.pad(ends * block, (1, 0))
    place = every + (offsets - starts)[experts]
    inverse = torch.empty_like(order).scatter_(0, order, place)
    length = places(len(order), num_experts, block)
    padded = torch.full((length,), len(order), device=ids.device).scatter_(0, place, order)
    every_block = torch.arange(-(-length // block), device=ids.device)
    expert = torch.searchsorted(ends, every_block, right=True)
    block_experts = torch.where(expert == num_experts, -1, expert)
    return DispatchPlan(padded, inverse.view(ids.shape), counts, offsets, block_experts)


def by_sort_int32(ids: Tensor, num_experts: int, block: int | None = None) -> DispatchPlan:
    """Plan likewise, with int32 results."""
    made = by_sort(ids, num_experts, block)
    return DispatchPlan._make(None if part is None else part.int() for part in made)
