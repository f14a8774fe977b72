"""``PlanSettings``: what is to be measured of the operation ``plan``. Imports no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from moe_routing.bench._settings import check_known, check_modes, check_tokens, plain
from moe_routing.planning.problem import PlanProblem
from moe_routing_registry.text import refusal

PLAN_COMPARISONS = {
    "sort": "a stable sort, bincount, a cumulative sum and a scatter in PyTorch, in its int64",
    "sort-int32": "the same with the int32 results that kernels for experts take",
}
"""What backends that plan are compared with."""


class PlanCase(NamedTuple):
    """One problem of planning and one number of tokens; without a block, in the sorted layout."""

    num_experts: int
    topk: int
    block: int | None
    tokens: int

    def __str__(self) -> str:
        """Say it in a line."""
        return f"{self.problem} T={self.tokens:,}"

    @property
    def title(self) -> str:
        """Name the problem above its table."""
        layout = "" if self.block is None else f", blocks of {self.block}"
        ids = self.problem.ids_dtype
        return f"plan, {ids} ids, E = {self.num_experts}, K = {self.topk}{layout}"

    @property
    def problem(self) -> PlanProblem:
        """What a backend is asked for."""
        return PlanProblem(
            num_experts=self.num_experts,
            topk=self.topk,
            layout="sorted" if self.block is None else "blocks",
            block=1 if self.block is None else self.block,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSettings:
    """What is to be measured of planning.

    :cvar operation: ``"plan"``.

    Every number of tokens, mode and implementation with every other.

    :ivar num_experts: E.
    :ivar topk: K, at most E: the ids of a token differ, as those of a router do.
    :ivar block: places of a block; ``None`` for the sorted layout.
    :ivar backends: as for routing; each that fits.
    :ivar tokens: T.
    :ivar device: ``"cpu"``, ``"cuda:0"``, ...
    :ivar modes: names in ``MODES``; whole calls, since no CUDA graph holds a comparison.
    :ivar compare: names in ``PLAN_COMPARISONS``.

    Raises ``ValueError`` that names the field for a value that cannot be.

    >>> len(PlanSettings(tokens=(1, 16)).cases)
    2
    """

    operation: ClassVar[str] = "plan"

    num_experts: int = 128
    topk: int = 8
    block: int | None = None
    backends: tuple[str, ...] = ("all",)
    tokens: tuple[int, ...] = (1, 16, 256, 4096, 65536)
    device: str = "cpu"
    modes: tuple[str, ...] = ("call",)
    compare: tuple[str, ...] = tuple(PLAN_COMPARISONS)

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        for name in ("num_experts", "topk", *(() if self.block is None else ("block",))):
            size = getattr(self, name)
            if not isinstance(size, int) or isinstance(size, bool):
                raise ValueError(refusal(name, "an int", size))  # noqa: TRY004 -- as Settings does
        check_known("compare", self.compare, PLAN_COMPARISONS)
        check_tokens(self.tokens)
        check_modes(self.modes, self.device)
        _ = self.cases[0].problem  # refuses sizes out of range
        if self.topk > self.num_experts:
            expected = f"1 <= topk <= num_experts ({self.num_experts})"
            raise ValueError(refusal("topk", expected, self.topk))

    @property
    def cases(self) -> list[PlanCase]:
        """Every number of tokens, in the order in which they are measured."""
        return [PlanCase(self.num_experts, self.topk, self.block, tokens) for tokens in self.tokens]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PlanSettings:
        """Rebuild from ``to_dict``'s values."""
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**{**values, **lists})
