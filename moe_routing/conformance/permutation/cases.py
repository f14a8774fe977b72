"""Cases of ``permute`` and ``combine``: made from a few words, the same on every machine."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from moe_routing.conformance.permutation import values
from moe_routing.conformance.permutation.calls import CombineCall, PermuteCall
from moe_routing.conformance.planning import ids as kinds
from moe_routing.planning import DispatchPlan, PlanProblem
from moe_routing.reference import permutation_oracle, plan_oracle

if TYPE_CHECKING:
    from torch import Generator, Tensor
    from typing_extensions import Self

    from moe_routing.conformance.permutation.calls import Call
    from moe_routing.planning.problem import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One call of either operation in words.

    :ivar columns: H.
    :ivar ids: what is planned, a key of ``planning.ids.KINDS``.
    :ivar rows: what the rows hold, a key of ``values.ROWS``.
    :ivar memory: how the rows lie, a key of ``values.MEMORY``.
    :ivar turn: which of the calls of the same shapes it is.
    :ivar seed: the seed that drew the case, where a seed did.
    """

    usual: ClassVar[tuple[str, ...]] = ("random", "normal", "contiguous")

    num_tokens: int = 33
    topk: int = 6
    num_experts: int = 16
    columns: int = 40
    dtype: str = "bfloat16"
    ids: str = "random"
    block: int | None = None
    capacity: int | None = None
    masked: bool = False
    rows: str = "normal"
    memory: str = "contiguous"
    turn: int = 0
    seed: int | None = None

    @property
    def family(self) -> str:
        """Moving and adding rows depends on no routing family."""
        return ""

    @property
    def id(self) -> str:
        """A name for test ids: only what differs from the usual is in it."""
        sizes = f"T{self.num_tokens}-K{self.topk}-E{self.num_experts}-H{self.columns}"
        words = [self.ids, self.rows, self.memory, *self.own]
        words = [sizes, self.dtype, *(word for word in words if word not in self.usual)]
        words += [] if self.block is None else [f"block{self.block}"]
        words += [] if self.capacity is None else [f"capacity{self.capacity}"]
        words += ["masked"] * self.masked
        words += [f"turn{self.turn}"] if self.turn else []
        words += [] if self.seed is None else [f"seed{self.seed}"]
        return "-".join(words)

    @property
    def own(self) -> list[str]:
        """Words of the operation alone."""
        return []

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the rows."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def but(self, **changes: Any) -> Self:  # noqa: ANN401 -- the fields above
        """Return the case with some words changed."""
        return replace(self, **changes)

    def generator(self) -> Generator:
        """Return random numbers of the case's own."""
        return torch.Generator().manual_seed(zlib.crc32(self.id.encode()))

    def planned(self, generator: Generator) -> tuple[Tensor, DispatchPlan]:
        """Draw ids, and return them with their plan."""
        sizes = (self.num_tokens, self.topk, self.num_experts)
        drawn = kinds.KINDS[self.ids](*sizes, generator)
        return drawn, self.plan_of(drawn)

    def plan_of(self, ids: Tensor) -> DispatchPlan:
        """Return the plan of ids, as the oracle of ``plan`` makes it."""
        layout: Layout = "masked" if self.masked else "sorted" if self.block is None else "blocks"
        problem = PlanProblem(
            num_experts=self.num_experts,
            topk=self.topk,
            ids_dtype="int64",
            layout=layout,
            block=self.block or 1,
            drop="nothing" if self.capacity is None else "last",
        )
        return plan_oracle.plan(problem, ids, self.capacity)

    def make(self, device: torch.device) -> Call:
        """Make the call on the device."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class PermuteCase(Case):
    """A call of ``permute``.

    :ivar quantize: whether the rows are quantized.
    """

    quantize: bool = False

    @property
    def own(self) -> list[str]:
        """Whether rows are quantized."""
        return ["quantized"] * self.quantize

    def make(self, device: torch.device) -> PermuteCall:
        """Make the call on the device."""
        generator = self.generator()
        _, plan = self.planned(generator)
        drawn = values.ROWS[self.rows](self.num_tokens, self.columns, self.torch_dtype, generator)
        return PermuteCall(
            hidden=values.MEMORY[self.memory](drawn.to(device)),
            plan=on_device(plan, device),
            quantize="float8_e4m3fn" if self.quantize else "",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CombineCase(Case):
    """A call of ``combine``.

    :ivar weights: their dtype, or ``""`` for none.
    :ivar weighing: what they are, a key of ``values.WEIGHTS``.
    :ivar flat: whether rows of a masked plan are one matrix.
    """

    usual: ClassVar[tuple[str, ...]] = ("random", "normal", "contiguous", "float32")

    weights: str = "float32"
    weighing: str = "random"
    flat: bool = False

    @property
    def own(self) -> list[str]:
        """The words for the weights, and the form of the rows."""
        return [
            f"by_{self.weights}" if self.weights else "unweighted", self.weighing,
            *["flat"] * self.flat,
        ]  # fmt: skip

    def make(self, device: torch.device) -> CombineCall:
        """Make the call on the device; at places without a pair rows hold NaN."""
        generator = self.generator()
        _, plan = self.planned(generator)
        sizes = (plan.order.numel(), self.columns, self.torch_dtype, generator)
        rows = values.ROWS[self.rows](*sizes)
        rows[permutation_oracle.is_empty(plan)] = torch.nan
        return self.called(rows, plan, generator, device)

    def called(
        self, rows: Tensor, plan: DispatchPlan, generator: Generator, device: torch.device
    ) -> CombineCall:
        """Make the call of rows in the order of a plan, with weights that are drawn."""
        weights = None
        if self.weights:
            sizes = (*plan.inverse.shape, getattr(torch, self.weights), generator)
            weights = values.WEIGHTS[self.weighing](*sizes).to(device)
            if self.memory != "contiguous":
                weights = values.MEMORY[self.memory](weights)
        rows = values.MEMORY[self.memory](rows.to(device))
        if self.masked and not self.flat:
            rows = rows.unflatten(0, plan.order.shape)
        return CombineCall(rows=rows, plan=on_device(plan, device), weights=weights)


def on_device(plan: DispatchPlan, device: torch.device) -> DispatchPlan:
    """Return the plan on the device."""
    return DispatchPlan(*(None if part is None else part.to(device) for part in plan))  # type: ignore[arg-type] # only the last two may be None
