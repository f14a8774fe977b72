"""What routes and can be timed: a backend, or what it is compared with."""

from __future__ import annotations

from types import CodeType, FunctionType
from typing import TYPE_CHECKING

import torch

import moe_routing
from moe_routing.bench._implementation import Implementation, NotMeasuredError
from moe_routing.bench.route._formulas import formula_of

if TYPE_CHECKING:
    from moe_routing import RoutingOutput
    from moe_routing.bench._settings import Case
    from moe_routing.bench.route._formulas import Formula
    from moe_routing.bench.route._inputs import Inputs
    from moe_routing_registry import ResolutionReport

_OWN_GRAPHS = "makes CUDA graphs of its own: see mode call"


def explain(case: Case, device: str, backend: str | None) -> ResolutionReport:
    """Report which backend the case gets on the device, or whether this one can have it.

    :raises UnknownNameError: no such backend.
    """
    if backend is not None:
        # A misspelt name is an error of its own.
        moe_routing.get_router(case.router, backend=backend)
    return moe_routing.explain(
        case.router,
        device=device,
        num_experts=case.num_experts,
        topk=case.topk,
        dtype=case.dtype,
        backend=backend,
    )


def backend(name: str, inputs: Inputs) -> Implementation:
    """Route through a backend."""
    route = moe_routing.get_router(inputs.case.router, backend=name)
    topk, operands = inputs.case.topk, inputs.operands

    def call(logits: torch.Tensor) -> RoutingOutput:
        return route(logits, topk, **operands)

    def into(logits: torch.Tensor, out: RoutingOutput) -> RoutingOutput:
        return route(logits, topk, **operands, out=out)

    return Implementation(name, True, call, into)  # noqa: FBT003 -- a field of a tuple


def comparison(name: str, inputs: Inputs) -> Implementation:
    """Route as others do.

    :raises NotMeasuredError: they do not route this.
    """
    if name == "baseline":
        return _baseline(inputs)
    formula = formula_of(inputs.spec)
    if formula is None:
        msg = f"nobody writes {inputs.spec.family} in a few lines of PyTorch"
        raise NotMeasuredError(msg)
    topk, operands = inputs.case.topk, inputs.operands
    mode = name.partition("-")[2]
    if mode:
        formula = torch.compile(_own(formula), mode=mode, dynamic=False)

    def call(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return formula(logits, topk, **operands)

    not_captured = "" if mode in ("", "default") else _OWN_GRAPHS
    return Implementation(name, False, call, not_captured=not_captured)  # noqa: FBT003 -- likewise


def _own(formula: Formula) -> Formula:
    """Copy the function: Dynamo keeps graphs, and counts recompilations, by code object."""
    assert isinstance(formula, FunctionType)  # noqa: S101 -- for mypy
    code: CodeType = formula.__code__.replace(co_name=f"{formula.__name__}_")
    own: Formula = FunctionType(
        code, formula.__globals__, code.co_name, formula.__defaults__, formula.__closure__
    )
    return own


def _baseline(inputs: Inputs) -> Implementation:
    spec, topk = inputs.spec, inputs.case.topk
    if inputs.logits[0].device.type == "cpu":
        msg = "a Triton kernel, which needs a GPU"
        raise NotMeasuredError(msg)
    if not spec.per_expert_scale or spec.shared_experts:
        msg = "it sorts for gemma4's formula only"
        raise NotMeasuredError(msg)
    try:
        from moe_routing.bench.full_sort import full_sort
    except ImportError as error:
        msg = f"a Triton kernel, and {error}"
        raise NotMeasuredError(msg) from error
    scale = inputs.operands["per_expert_scale"]

    def call(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = (
            torch.empty(len(logits), topk, device=logits.device),
            torch.empty(len(logits), topk, device=logits.device, dtype=torch.int32),
        )
        full_sort(logits, topk, scale, out)
        return out

    def into(logits: torch.Tensor, out: RoutingOutput) -> None:
        full_sort(logits, topk, scale, out)

    return Implementation("baseline", False, call, into)  # noqa: FBT003 -- likewise
