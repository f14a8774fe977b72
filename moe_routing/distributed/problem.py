"""``ExchangeProblem``: what a transport of tokens between ranks is asked to build.

Free of torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from moe_routing_registry.text import refusal

Reduce = Literal["none", "rank"]
REDUCE = ("none", "rank")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeProblem:
    """One kernel of the operation ``exchange`` to build: the transport of one ``ExpertParallel``.

    A field that is 0 or ``""`` where that makes no sense was not stated: whatever comes must do.

    :cvar operation: ``"exchange"``.
    :cvar family: ``""``: moving tokens depends on no routing formula.
    :ivar ranks: n, the ranks of the group.
    :ivar hosts: the hosts that they run on.
    :ivar experts_per_rank: expert e is on rank ``e // experts_per_rank``.
    :ivar reduce: what comes back to a token: a row of each slot (``"none"``), or of each rank the
        sum over the slots whose experts are there (``"rank"``).
    :ivar shared_batch: whether every rank holds the same tokens.
    :ivar max_tokens: the most tokens of a rank.
    :ivar capacity: the most rows that a rank keeps for each other: of slots (``"none"``), or of
        tokens (``"rank"``). A transport that loses no rows need not keep fewer.
    :ivar topk: K, the slots of a token.
    :ivar hidden_size: H, the columns of a token's row.
    :ivar dtype: of the rows: the name of any dtype of torch.
    """

    operation: ClassVar[str] = "exchange"
    family: ClassVar[str] = ""

    ranks: int
    hosts: int = 1
    experts_per_rank: int
    reduce: Reduce = "none"
    shared_batch: bool = False
    max_tokens: int = 0
    capacity: int = 0
    topk: int = 0
    hidden_size: int = 0
    dtype: str = ""

    def __post_init__(self) -> None:
        """Require what a group can be asked for.

        :raises ValueError: a value is none of those.
        """
        for name in ("ranks", "hosts", "experts_per_rank"):
            if getattr(self, name) < 1:
                raise ValueError(refusal(name, "an int of at least 1", getattr(self, name)))
        for name in ("max_tokens", "capacity", "topk", "hidden_size"):
            if getattr(self, name) < 0:
                raise ValueError(refusal(name, "an int of at least 0", getattr(self, name)))
        if self.capacity and not self.max_tokens:
            raise ValueError(refusal("capacity", "0 without max_tokens", self.capacity))
        if self.reduce not in REDUCE:
            raise ValueError(refusal("reduce", "'none' or 'rank'", self.reduce))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "operation": self.operation,
            "ranks": self.ranks,
            "hosts": self.hosts,
            "experts_per_rank": self.experts_per_rank,
            "reduce": self.reduce,
            "shared_batch": self.shared_batch,
            "max_tokens": self.max_tokens,
            "capacity": self.capacity,
            "topk": self.topk,
            "hidden_size": self.hidden_size,
            "dtype": self.dtype,
        }

    def __str__(self) -> str:
        """Name the problem in a line: ``exchange ranks=2 E=128 reduce=none``."""
        stated = (
            ("hosts", self.hosts if self.hosts > 1 else 0),
            ("K", self.topk),
            ("H", self.hidden_size),
            ("max_tokens", self.max_tokens),
            ("capacity", self.capacity),
        )
        words = [
            f"exchange ranks={self.ranks} E={self.ranks * self.experts_per_rank}",
            f"reduce={self.reduce}",
            *(f"{name}={value}" for name, value in stated if value),
            *([self.dtype] if self.dtype else []),
            *(["shared batch"] if self.shared_batch else []),
        ]
        return " ".join(words)


EXCHANGE_EXAMPLE = ExchangeProblem(
    ranks=2, experts_per_rank=64, topk=8, hidden_size=2816, dtype="bfloat16"
)
