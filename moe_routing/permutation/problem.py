"""``PermuteProblem`` and ``CombineProblem``: what a backend is asked to build.

Free of torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from moe_routing.planning.problem import MAX_TOPK, Layout
from moe_routing_registry.text import refusal

Quantize = Literal["", "float8_e4m3fn"]

GROUP = 128
"""Neighbouring values of a row that share a scale."""
FLOATS = ("bfloat16", "float16", "float32")
"""Dtypes of rows that can be quantized, or combined."""
ANY_FLOAT = f"{', '.join(FLOATS[:-1])} or {FLOATS[-1]}"
"""How errors name them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PermuteProblem:
    """One kernel of the operation ``permute`` to build: for any numbers of tokens and columns.

    :cvar operation: ``"permute"``.
    :cvar family: ``""``: moving rows depends on no routing formula.
    :ivar topk: K, the slots of a token.
    :ivar dtype: of the rows: the name of any dtype of torch.
    :ivar layout: of the plan.
    :ivar quantize: the dtype of the result, ``""`` for the rows' own.
    """

    operation: ClassVar[str] = "permute"
    family: ClassVar[str] = ""

    topk: int
    dtype: str
    layout: Layout = "sorted"
    quantize: Quantize = ""

    def __post_init__(self) -> None:
        """Require what ``permute`` takes.

        :raises ValueError: a value is none of those.
        """
        _check_topk(self.topk)
        if self.quantize and self.dtype not in FLOATS:
            raise ValueError(refusal("dtype", f"{ANY_FLOAT}, to be quantized", self.dtype))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "operation": self.operation,
            "topk": self.topk,
            "dtype": self.dtype,
            "layout": self.layout,
            "quantize": self.quantize,
        }

    def __str__(self) -> str:
        """Name the problem in a line: ``permute K=8 bfloat16``."""
        layout = "" if self.layout == "sorted" else f" {self.layout}"
        to = f" to {self.quantize}" if self.quantize else ""
        return f"permute K={self.topk} {self.dtype}{to}{layout}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CombineProblem:
    """One kernel of the operation ``combine`` to build: for any numbers of tokens and columns.

    :cvar operation: ``"combine"``.
    :cvar family: ``""``, as of ``PermuteProblem``.
    :ivar topk: K, the slots of a token.
    :ivar dtype: of the rows: one of ``FLOATS``.
    :ivar weights: the dtype of the weights, one of ``FLOATS``; ``""`` for sums without weights.
    """

    operation: ClassVar[str] = "combine"
    family: ClassVar[str] = ""

    topk: int
    dtype: str
    weights: str = "float32"

    def __post_init__(self) -> None:
        """Require what ``combine`` takes.

        :raises ValueError: a value is none of those.
        """
        _check_topk(self.topk)
        if self.dtype not in FLOATS:
            raise ValueError(refusal("dtype", ANY_FLOAT, self.dtype))
        if self.weights and self.weights not in FLOATS:
            raise ValueError(refusal("weights", f"{ANY_FLOAT}, or ''", self.weights))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "operation": self.operation,
            "topk": self.topk,
            "dtype": self.dtype,
            "weights": self.weights,
        }

    def __str__(self) -> str:
        """Name the problem in a line: ``combine K=8 bfloat16 weights=float32``."""
        weights = f" weights={self.weights}" if self.weights else ""
        return f"combine K={self.topk} {self.dtype}{weights}"


def _check_topk(topk: int) -> None:
    if not 1 <= topk <= MAX_TOPK:
        raise ValueError(refusal("topk", f"an int from 1 to {MAX_TOPK}", topk))


PERMUTE_EXAMPLE = PermuteProblem(topk=8, dtype="bfloat16")
COMBINE_EXAMPLE = CombineProblem(topk=8, dtype="bfloat16")
"""The problems that doctor asks every backend for."""
