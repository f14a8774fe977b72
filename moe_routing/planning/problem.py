"""``PlanProblem``: what a backend is asked to build for the operation ``plan``.

Free of torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from moe_routing_registry.text import refusal

Layout = Literal["sorted", "blocks", "masked"]
Drop = Literal["nothing", "last", "least_weight"]

MAX_EXPERTS = 4096
MAX_TOPK = 64
MOST = 2**31 - 1
"""The highest place that int32 holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanProblem:
    """One kernel of the operation ``plan`` to build: it serves any number of tokens.

    :cvar operation: ``"plan"``.
    :cvar family: ``""``: a plan depends on no routing formula.
    :ivar num_experts: E.
    :ivar topk: K, the columns of the ids.
    :ivar ids_dtype: ``"int32"`` or ``"int64"``.
    :ivar layout: where an expert's pairs lie. ``"sorted"``: right after those of the expert before.
        ``"blocks"``: from the next multiple of ``block`` on. ``"masked"``: in a row of a matrix
        ``[E, capacity]``.
    :ivar block: places of a block; 1 for the other layouts.
    :ivar drop: which pairs of an expert have no place when there are more than its capacity:
        ``"last"`` or ``"least_weight"``; ``"nothing"`` without a capacity.
    """

    operation: ClassVar[str] = "plan"
    family: ClassVar[str] = ""

    num_experts: int
    topk: int
    ids_dtype: str = "int32"
    layout: Layout = "sorted"
    block: int = 1
    drop: Drop = "nothing"

    def __post_init__(self) -> None:
        """Require sizes that ``plan`` takes.

        :raises ValueError: a size is out of its range.
        """
        most = {"num_experts": MAX_EXPERTS, "topk": MAX_TOPK, "block": MOST}
        for name, limit in most.items():
            if not 1 <= getattr(self, name) <= limit:
                expected = f"an int from 1 to {limit}"
                raise ValueError(refusal(name, expected, getattr(self, name)))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "operation": self.operation,
            "num_experts": self.num_experts,
            "topk": self.topk,
            "ids_dtype": self.ids_dtype,
            "layout": self.layout,
            "block": self.block,
            "drop": self.drop,
        }

    def __str__(self) -> str:
        """Name the problem in a line: ``plan E=128 K=8 int32``."""
        extras = "".join(
            f" {text}"
            for text, said in (
                (f"block={self.block}", self.layout == "blocks"),
                ("masked", self.layout == "masked"),
                (f"drop={self.drop}", self.drop != "nothing"),
            )
            if said
        )
        return f"plan E={self.num_experts} K={self.topk} {self.ids_dtype}{extras}"


PLAN_EXAMPLE = PlanProblem(num_experts=128, topk=8)
"""The problem that doctor asks every backend for."""
