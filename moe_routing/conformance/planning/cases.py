"""Cases of ``plan``: made from a few words, the same on every machine."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

import moe_routing
from moe_routing.conformance.planning import ids as kinds
from moe_routing.planning import DispatchPlan, PlanProblem
from moe_routing.reference import plan_oracle

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.conformance.under_test import BackendUnderTest
    from moe_routing.planning.problem import Drop, Layout

POISON = -7
"""A number that no part of a plan holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One call of ``plan`` in words.

    :ivar ids: key of ``ids.KINDS``.
    :ivar weights: key of ``ids.WEIGHTS``, for ``drop="least_weight"``.
    :ivar memory: key of ``ids.MEMORY``, for ids and weights.
    :ivar seed: the seed that drew the case, where a seed did.
    """

    num_tokens: int = 33
    topk: int = 8
    num_experts: int = 64
    ids: str = "random"
    ids_dtype: str = "int32"
    memory: str = "contiguous"
    block: int | None = None
    capacity: int | None = None
    drop: Literal["last", "least_weight"] = "last"
    weights: str = "random"
    masked: bool = False
    seed: int | None = None

    @property
    def family(self) -> str:
        """A plan depends on no routing family."""
        return ""

    @property
    def id(self) -> str:
        """A name for test ids: only what differs from the usual is in it."""
        words = [f"T{self.num_tokens}", f"K{self.topk}", f"E{self.num_experts}", self.ids]
        usual = ("int32", "contiguous")
        words += [word for word in (self.ids_dtype, self.memory) if word not in usual]
        words += [] if self.block is None else [f"block{self.block}"]
        words += [] if self.capacity is None else [f"capacity{self.capacity}"]
        words += [f"least_weight_{self.weights}"] if self.drop == "least_weight" else []
        words += ["masked"] * self.masked
        words += [] if self.seed is None else [f"seed{self.seed}"]
        return "-".join(words)

    def but(self, **changes: Any) -> Case:  # noqa: ANN401 -- the fields above
        """Return the case with some words changed."""
        return replace(self, **changes)

    def make(self, device: torch.device) -> Call:
        """Make the call on the device."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.id.encode()))
        sizes = (self.num_tokens, self.topk)
        drawn = kinds.KINDS[self.ids](*sizes, self.num_experts, generator)
        lay = kinds.MEMORY[self.memory]
        weights = None
        if self.drop == "least_weight":
            weights = lay(kinds.WEIGHTS[self.weights](*sizes, generator).to(device))
        return Call(
            ids=lay(drawn.to(device, getattr(torch, self.ids_dtype))),
            num_experts=self.num_experts,
            block=self.block,
            capacity=self.capacity,
            drop=self.drop,
            weights=weights,
            masked=self.masked,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """The arguments of one call of ``plan``."""

    ids: Tensor
    num_experts: int
    block: int | None = None
    capacity: int | None = None
    drop: Literal["last", "least_weight"] = "last"
    weights: Tensor | None = None
    masked: bool = False

    def but(self, **changes: Any) -> Call:  # noqa: ANN401 -- the fields above
        """Return the call with some arguments changed."""
        return replace(self, **changes)

    @property
    def options(self) -> dict[str, Any]:
        """The arguments after ids and num_experts."""
        names = ("block", "capacity", "drop", "weights", "masked")
        return {name: getattr(self, name) for name in names}

    @property
    def problem(self) -> PlanProblem:
        """What a backend is asked to build for the call."""
        layout: Layout = "masked" if self.masked else "sorted" if self.block is None else "blocks"
        drop: Drop = "nothing" if self.capacity is None else self.drop
        return PlanProblem(
            num_experts=self.num_experts,
            topk=self.ids.shape[1],
            ids_dtype=str(self.ids.dtype).removeprefix("torch."),
            layout=layout,
            block=self.block or 1,
            drop=drop,
        )

    def expected(self) -> DispatchPlan:
        """Return the one right plan, on the CPU."""
        return plan_oracle.plan(self.problem, self.ids, self.capacity, self.weights)

    @property
    def shapes(self) -> tuple[tuple[int, ...] | None, ...]:
        """The shape of each part, as the contract says."""
        pairs, experts, block = self.ids.numel(), self.num_experts, self.block
        length = pairs + min(pairs, experts) * ((block or 1) - 1)
        order = (experts, self.capacity or 0) if self.masked else (length,)
        blocks = None if block is None else (-(-length // block),)
        dropped = None if self.capacity is None else (1,)
        return order, tuple(self.ids.shape), (experts,), (experts + 1,), blocks, dropped


def outputs(call: Call) -> DispatchPlan:
    """Allocate a plan for a call, whose elements are all ``POISON``."""
    device = call.ids.device
    return DispatchPlan(
        *(
            None if shape is None else torch.full(shape, POISON, dtype=torch.int32, device=device)
            for shape in call.shapes
        )  # type: ignore[arg-type]  # only the last two may be None
    )


def plan(under_test: BackendUnderTest, call: Call, out: DispatchPlan | None = None) -> DispatchPlan:
    """Plan a call as users do.

    :raises DeclinedError: the backend declines the problem.
    """
    # Memory that the allocator hands out next must not happen to hold the right answer.
    poison = outputs(call)
    del poison
    with under_test.declining():
        return moe_routing.plan(
            call.ids, call.num_experts, backend=under_test.backend, out=out, **call.options
        )


def checked(under_test: BackendUnderTest, call: Call, what: str = "") -> DispatchPlan:
    """Plan a call and hold the outcome against the oracle."""
    made = plan(under_test, call)
    must_match(call, made, what)
    return made


def must_match(call: Call, made: DispatchPlan, what: str = "") -> None:
    """Raise ``AssertionError`` that says where a plan is not the right one, field by field.

    :param what: stands in front of the message.
    """
    must_equal(made, call.expected(), what)
    for name, part in zip(made._fields, made, strict=True):
        if part is not None and part.device != call.ids.device:
            msg = f"{name}: expected a tensor on {call.ids.device}, got one on {part.device}"
            raise AssertionError(msg)


def must_equal(made: DispatchPlan, expected: DispatchPlan, what: str = "") -> None:
    """Raise ``AssertionError`` that names the first field in which two plans differ, and where."""
    front = f"{what}: " if what else ""
    for name, part, right in zip(made._fields, made, expected, strict=True):
        problem = _difference(part, right)
        if problem:
            msg = f"{front}{name}: {problem}"
            raise AssertionError(msg)


def _difference(part: Tensor | None, right: Tensor | None) -> str:
    if part is None or right is None:
        return "" if part is right else f"expected {_said(right)}, got {_said(part)}"
    if part.dtype != torch.int32 or part.shape != right.shape or not part.is_contiguous():
        return f"expected a contiguous {_said(right)}, got {_said(part)}, strides {part.stride()}"
    part, right = part.cpu(), right.cpu()
    if torch.equal(part, right):
        return ""
    wrong = (part != right).nonzero()
    where = tuple(wrong[0].tolist())
    return (
        f"{len(wrong)} of {right.numel()} are wrong, the first at {list(where)}: "
        f"expected {int(right[where])}, got {int(part[where])}"
    )


def _said(part: Tensor | None) -> str:
    return "None" if part is None else f"{part.dtype} {list(part.shape)}"
