"""Cases: what is exchanged, made from a few words, the same on every rank."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import distributed

import moe_routing
from moe_routing.conformance.permutation import values
from moe_routing.distributed import ExpertParallel
from moe_routing.reference import exchange_oracle as oracle

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Generator, Tensor

    from moe_routing import DispatchPlan
    from moe_routing.conformance.under_test import BackendUnderTest
    from moe_routing.distributed.problem import Reduce
    from moe_routing.reference.permutation_oracle import Between

TOKENS = {
    "mixed": (7, 33, 2, 12),
    "same": (17,),
    "one": (1,),
    "some_none": (0, 5, 0, 9),
    "none": (0,),
    "many": (129, 200),
}
"""Numbers of tokens of the ranks, which repeat where there are more ranks."""
EXTRA = 3
"""Columns that results have more than rows, where they have more."""


class Operands(NamedTuple):
    """What one rank dispatches, on the device."""

    hidden: Tensor
    ids: Tensor
    weights: Tensor
    scales: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One exchange in words.

    :ivar tokens: key of ``TOKENS``.
    :ivar experts: E for each rank.
    :ivar placement: where experts are: as many on each rank, anywhere, or all on rank 0.
    :ivar ids: all of experts, some of none, or some that repeat in a row.
    :ivar padded: whether ``max_tokens`` is stated.
    :ivar rows: what rows hold: ``"normal"``, or ``"bits"`` of any kind.
    :ivar strided: whether operands lie apart in memory.
    :ivar wider: whether results have more columns than rows.
    :ivar turn: tells cases apart that differ in nothing else.
    :ivar seed: the seed that drew the case, where a seed did.
    """

    reduce: Reduce = "none"
    shared: bool = False
    padded: bool = False
    tokens: str = "mixed"
    experts: int = 4
    topk: int = 3
    columns: int = 24
    dtype: str = "bfloat16"
    weights: str = "float32"
    ids_dtype: str = "int32"
    placement: Literal["even", "mapped", "one_rank"] = "even"
    ids: Literal["experts", "strays", "repeated"] = "experts"
    rows: Literal["normal", "bits"] = "normal"
    scales: bool = False
    strided: bool = False
    wider: bool = False
    turn: int = 0
    seed: int = 0

    @property
    def id(self) -> str:
        """Name for test ids: what is not as usual."""
        said = [
            field.name if value is True else f"{field.name}_{value}"
            for field in fields(self)
            if (value := getattr(self, field.name)) != field.default
        ]
        return "-".join(said) or "usual"

    @property
    def family(self) -> str:
        """Moving tokens depends on no routing family."""
        return ""

    def but(self, **changes: Any) -> Case:  # noqa: ANN401 -- fields
        """Return the case with changes."""
        return replace(self, **changes)

    def make(self, device: torch.device) -> World:
        """Draw the tokens of all ranks, the same on each of them."""
        ranks = distributed.get_world_size()
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.id} {ranks}".encode()))
        number = self.experts * ranks
        placement = {
            "even": [expert // self.experts for expert in range(number)],
            "mapped": torch.randint(ranks, (number,), generator=generator).tolist(),
            "one_rank": [0] * number,
        }[self.placement]
        of = TOKENS[self.tokens]
        numbers = [of[0 if self.shared else rank % len(of)] for rank in range(ranks)]
        drawn = [self._operands(tokens, number, generator) for tokens in numbers]
        return World(self, placement, [drawn[0]] * ranks if self.shared else drawn, device)

    def _operands(self, tokens: int, number: int, generator: Generator) -> Operands:
        dtype = getattr(torch, self.dtype)
        draw = values.bits if self.rows == "bits" else values._normal  # noqa: SLF001 -- of the kit
        hidden = draw(tokens, self.columns, dtype, generator)
        topk = self.topk
        ids = torch.rand(tokens, number, generator=generator).argsort(dim=1)[:, :topk]
        if self.ids == "repeated":
            ids[:, topk // 2 :] = ids[:, :1]
        if self.ids == "strays":
            stray = torch.tensor([-1, number, number + 7, -(2**31)])
            which = torch.randint(len(stray), ids.shape, generator=generator)
            ids = torch.where(torch.rand(ids.shape, generator=generator) < 0.3, stray[which], ids)  # noqa: PLR2004 -- some
        weights = torch.rand(tokens, topk, generator=generator).to(getattr(torch, self.weights))
        scales = torch.rand(tokens, 2, generator=generator) if self.scales else None
        return Operands(hidden, ids.to(getattr(torch, self.ids_dtype)), weights, scales)


class World:
    """The tokens of all ranks, on the CPU, and this rank's on the device."""

    def __init__(
        self, case: Case, placement: list[int], drawn: list[Operands], device: torch.device
    ) -> None:
        """Keep what the case drew."""
        self.case, self.placement, self.drawn, self.device = case, placement, drawn, device
        self.rank, self.ranks = distributed.get_rank(), len(drawn)
        self.mine = Operands(*(self._placed(part) for part in drawn[self.rank]))
        self.experts = [e for e, rank in enumerate(placement) if rank == self.rank]
        factors = torch.arange(len(placement)) % 5 + 1  # exact in every dtype
        self.factors = factors.to(self.result_dtype)

    def _placed(self, part: Tensor | None) -> Any:  # noqa: ANN401 -- Tensor or None, as it came
        if part is None:
            return None
        part = part.to(self.device)
        if not self.case.strided:
            return part.clone()
        wide = part.new_empty(len(part), 2, part.shape[1] + 5)
        wide[:, 1, 3 : 3 + part.shape[1]] = part
        return wide[:, 1, 3 : 3 + part.shape[1]]

    @property
    def result_dtype(self) -> torch.dtype:
        """The dtype of the experts' results: the rows' own, or bfloat16 for rows of fp8."""
        dtype: torch.dtype = getattr(torch, self.case.dtype)
        return dtype if dtype.itemsize > 1 and dtype.is_floating_point else torch.bfloat16

    def parallel(self, under_test: BackendUnderTest, **words: Any) -> ExpertParallel:  # noqa: ANN401 -- the arguments
        """Return the ``ExpertParallel`` that a user of this transport gets."""
        case = self.case
        given: dict[str, Any] = {
            "num_experts": len(self.placement),
            "placement": None if case.placement == "even" else self.placement,
            "reduce": case.reduce,
            "shared_batch": case.shared,
            "max_tokens": max(len(one.ids) for one in self.drawn) + 2 if case.padded else None,
            "device": self.device,
            "transport": under_test.backend,
        }
        with under_test.declining():
            return ExpertParallel(None, **(given | words))

    def expert(self, rows: Tensor, experts: Tensor) -> Tensor:
        """Compute experts on rows ``[N, H]``, each by its own factor: the same bits on any rank."""
        factors = self.factors.to(rows.device)[experts.long()][:, None]
        results: Tensor = rows.to(self.result_dtype) * factors
        return torch.cat((results, results[:, :EXTRA]), dim=1) if self.case.wider else results

    def computed(self, rows: Tensor, plan: DispatchPlan) -> Tensor:
        """Return the results of this rank's experts, and NaN where there is no row of any."""
        counts = plan.counts[: len(self.experts)].long()
        experts = torch.tensor(self.experts, device=rows.device).repeat_interleave(counts)
        used = self.expert(rows[: len(experts)], experts)
        rest = used.new_full((len(rows) - len(experts), used.shape[1]), torch.nan)
        return torch.cat((used, rest))

    def arrivals(self) -> list[oracle.Arrival]:
        """Return what this rank's experts get."""
        drawn = self.drawn[:1] if self.case.shared else self.drawn
        return oracle.arrivals([one.ids for one in drawn], self.experts)

    def right(self) -> Between:
        """Return between what this rank's results lie."""
        hidden, ids, weights, _ = self.drawn[self.rank]
        known = (ids >= 0) & (ids < len(self.placement))
        pairs = hidden.repeat_interleave(ids.shape[1], dim=0)
        results = self.expert(pairs, torch.where(known, ids, 0).flatten())
        results = results.unflatten(0, ids.shape)
        if self.case.shared:
            return oracle.summed_in_any_order(results, ids, weights, self.placement)
        return oracle.exchange(results, ids, weights, self.placement, self.case.reduce)

    def on_one_rank(self, whole: Sequence[Tensor]) -> Tensor:
        """Compute all ranks' tokens here, with all experts: ``[sum of T, H']``."""
        hidden, ids, weights = whole
        plan = moe_routing.plan(ids, len(self.placement))
        rows = moe_routing.permute(hidden, plan)
        experts = torch.arange(len(self.placement), device=rows.device)
        each = experts.repeat_interleave(plan.counts.long())
        used = self.expert(rows[: len(each)], each)
        rest = used.new_full((len(rows) - len(each), used.shape[1]), torch.nan)
        return moe_routing.combine(torch.cat((used, rest)), plan, weights)

    def whole(self) -> list[Tensor]:
        """Return hidden states, ids and weights of all ranks, one after the other."""
        drawn = self.drawn[:1] if self.case.shared else self.drawn
        parts = zip(*(one[:3] for one in drawn), strict=True)
        return [torch.cat(tuple(part)).to(self.device) for part in parts]

    def of_this_rank(self, whole: Tensor) -> Tensor:
        """Return this rank's part of rows of all ranks."""
        if self.case.shared:
            return whole
        parts: tuple[Tensor, ...] = whole.split([len(one.ids) for one in self.drawn])
        return parts[self.rank]
