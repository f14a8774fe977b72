"""``BalanceProblem``: what a backend is asked to build for the sums that losses are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from moe_routing_registry.text import refusal

Score = Literal["softmax", "sigmoid", "sqrtsoftplus", "logsumexp"]
Counts = Literal["ids", "best", ""]

SCORES = ("softmax", "sigmoid", "sqrtsoftplus")
"""Score functions of load balancing losses."""
LOGSUMEXP = "logsumexp"
"""In place of scores: the squares of log(sum(e**logits)), which the z-loss is made of."""
FLOATS = ("bfloat16", "float16", "float32", "float64")
"""Dtypes of logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BalanceProblem:
    """One kernel of the operation ``balance`` to build: for any numbers of batches and tokens.

    :cvar operation: ``"balance"``.
    :cvar family: ``""``: a loss knows a score function, not a routing formula.
    :ivar score: one of ``SCORES``, or ``LOGSUMEXP``.
    :ivar num_experts: E, the columns of the logits.
    :ivar dtype: of the logits: one of ``FLOATS``.
    :ivar counts: what is counted for each expert: ``"ids"`` that come with the call, or the
        ``"best"`` scores of each token, which are then rounded to the dtype of the logits before
        they are compared and summed, as transformers does. ``""``, nothing, for ``LOGSUMEXP``.
    :ivar topk: K, the ids of a token, or how many scores of a token are its best; 0 where nothing
        is counted.
    """

    operation: ClassVar[str] = "balance"
    family: ClassVar[str] = ""

    score: Score
    num_experts: int
    dtype: str
    counts: Counts = "ids"
    topk: int = 0

    def __post_init__(self) -> None:
        """Require what ``balance`` takes.

        :raises ValueError: a value is none of those.
        """
        if self.score not in (*SCORES, LOGSUMEXP):
            expected = f"one of {', '.join(map(repr, (*SCORES, LOGSUMEXP)))}"
            raise ValueError(refusal("score", expected, self.score))
        allowed = {LOGSUMEXP: ("",), "softmax": ("ids", "best")}.get(self.score, ("ids",))
        if self.counts not in allowed:
            expected = f"one of {', '.join(map(repr, allowed))} with the score {self.score!r}"
            raise ValueError(refusal("counts", expected, self.counts))
        if self.num_experts < 1:
            raise ValueError(refusal("num_experts", "an int of 1 or more", self.num_experts))
        most = self.num_experts if self.counts == "best" else self.topk
        if not bool(self.counts) <= self.topk <= (most if self.counts else 0):
            expected = "an int of 1 or more, up to num_experts for the best; 0 to count nothing"
            raise ValueError(refusal("topk", expected, self.topk))
        if self.dtype not in FLOATS:
            raise ValueError(refusal("dtype", f"one of {', '.join(FLOATS)}", self.dtype))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "operation": self.operation,
            "score": self.score,
            "num_experts": self.num_experts,
            "dtype": self.dtype,
            "counts": self.counts,
            "topk": self.topk,
        }

    def __str__(self) -> str:
        """Name the problem in a line: ``balance softmax E=128 K=8 bfloat16``."""
        counted = {"ids": f" K={self.topk}", "best": f" best {self.topk}"}.get(self.counts, "")
        return f"balance {self.score} E={self.num_experts}{counted} {self.dtype}"


BALANCE_EXAMPLE = BalanceProblem(score="softmax", num_experts=128, dtype="bfloat16", topk=8)
"""The problem that doctor asks every backend for."""
