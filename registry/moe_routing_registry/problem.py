"""``RoutingProblem``: what a backend is asked to build."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from moe_routing_registry.routing_spec import RoutingSpec

Layout = Literal["rows", "strided"]

COMPOSED_OPERANDS = ("counts", "replicas")
"""Operands that the router handles after the kernel of a backend that does not name them.

``replicas`` are ``logical_to_physical`` and ``replica_count``, which come together.
"""
OPTIONAL_OPERANDS = ("ids", "valid", *COMPOSED_OPERANDS)
"""Operands of ``route`` that not every backend takes: ``BackendSpec.operands`` names them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingProblem:
    """One kernel of the operation ``route`` to build: it serves any number of tokens.

    :cvar operation: ``"route"``.
    :ivar spec: the maths.
    :ivar num_experts: E, the columns of the logits.
    :ivar topk: K, the experts a token selects (shared-expert slots not counted).
    :ivar dtype: dtype of the logits, ``"bfloat16"`` for example.
    :ivar ids_dtype: ``"int32"`` or ``"int64"``.
    :ivar training: whether gradients must flow from the weights.
    :ivar layout: ``"rows"`` where the experts of a row lie next to each other (any row stride),
        else ``"strided"``.
    :ivar operands: which of ``OPTIONAL_OPERANDS`` a call brings.
    """

    operation: ClassVar[str] = "route"

    spec: RoutingSpec
    num_experts: int
    topk: int
    dtype: str
    ids_dtype: str = "int32"
    training: bool = False
    layout: Layout = "rows"
    operands: frozenset[str] = frozenset()

    @property
    def family(self) -> str:
        """Name of the routing family."""
        return self.spec.family

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "operation": self.operation,
            "family": self.family,
            "spec": self.spec.to_json(),
            "num_experts": self.num_experts,
            "topk": self.topk,
            "dtype": self.dtype,
            "ids_dtype": self.ids_dtype,
            "training": self.training,
            "layout": self.layout,
            "operands": sorted(self.operands),
        }

    def __str__(self) -> str:
        """Name the problem in a line: ``gemma4 E=128 K=8 bfloat16``."""
        extras = "".join(
            f" {text}"
            for text, said in (
                (self.ids_dtype, self.ids_dtype != "int32"),
                ("training", self.training),
                ("strided", self.layout != "rows"),
                (f"with {', '.join(sorted(self.operands))}", bool(self.operands)),
            )
            if said
        )
        return f"{self.spec.family} E={self.num_experts} K={self.topk} {self.dtype}{extras}"
