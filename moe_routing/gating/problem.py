"""``GateProblem``: what a backend is asked to build for the operation ``gate``.

Free of torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from moe_routing_registry import RoutingProblem
from moe_routing_registry.text import refusal

if TYPE_CHECKING:
    from moe_routing_registry import RoutingSpec

Norm = Literal["", "rms", "rms_weight"]

FLOATS = ("bfloat16", "float16", "float32")
"""Dtypes of hidden states, and of logits."""
MAX_EXPERTS = 1024
MAX_HIDDEN = 16384


@dataclass(frozen=True, slots=True, kw_only=True)
class GateProblem:
    """One kernel of the operation ``gate`` to build: it serves any number of tokens.

    :cvar operation: ``"gate"``.
    :ivar spec: the maths of routing.
    :ivar num_experts: E, the rows of the router weight.
    :ivar topk: K, the experts a token selects.
    :ivar hidden_size: H, the columns of the hidden states.
    :ivar dtype: dtype of the hidden states, one of ``FLOATS``.
    :ivar float32_weight: whether the router weight is float32 instead of that.
    :ivar router_bias: whether the linear layer has a bias.
    :ivar norm: ``"rms"`` or ``"rms_weight"`` where a norm comes first, without or with a weight.
    :ivar input_scale: whether each column has a factor.
    :ivar logits_dtype: what logits are rounded to before selection, one of ``FLOATS``.
    :ivar ids_dtype: ``"int32"`` or ``"int64"``.
    :ivar invariant: whether the bits of a row may not depend on the other rows.
    :ivar operands: as of ``RoutingProblem``.
    """

    operation: ClassVar[str] = "gate"

    spec: RoutingSpec
    num_experts: int
    topk: int
    hidden_size: int
    dtype: str
    float32_weight: bool = False
    router_bias: bool = False
    norm: Norm = ""
    input_scale: bool = False
    logits_dtype: str = "float32"
    ids_dtype: str = "int32"
    invariant: bool = True
    operands: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        """Require what ``gate`` takes.

        :raises ValueError: a size is out of its range, or a dtype is another.
        """
        for name, most in (("num_experts", MAX_EXPERTS), ("hidden_size", MAX_HIDDEN)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(refusal(name, f"an int from 1 to {most}", getattr(self, name)))
        for name in ("dtype", "logits_dtype"):
            if getattr(self, name) not in FLOATS:
                expected = f"one of {', '.join(FLOATS)}"
                raise ValueError(refusal(name, expected, getattr(self, name)))
        self.spec.check_size(self.num_experts, self.topk)

    @property
    def family(self) -> str:
        """Name of the routing family."""
        return self.spec.family

    @property
    def weight_dtype(self) -> str:
        """Dtype of the router weight."""
        return "float32" if self.float32_weight else self.dtype

    @property
    def routing(self) -> RoutingProblem:
        """What routes the logits, where the kernel does not."""
        return RoutingProblem(
            spec=self.spec,
            num_experts=self.num_experts,
            topk=self.topk,
            dtype=self.logits_dtype,
            ids_dtype=self.ids_dtype,
            operands=self.operands,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "operation": self.operation,
            "family": self.family,
            "spec": self.spec.to_json(),
            "num_experts": self.num_experts,
            "topk": self.topk,
            "hidden_size": self.hidden_size,
            "dtype": self.dtype,
            "float32_weight": self.float32_weight,
            "router_bias": self.router_bias,
            "norm": self.norm,
            "input_scale": self.input_scale,
            "logits_dtype": self.logits_dtype,
            "ids_dtype": self.ids_dtype,
            "invariant": self.invariant,
            "operands": sorted(self.operands),
        }

    def __str__(self) -> str:
        """Name the problem in a line: ``gate gemma4 E=128 K=8 H=2816 bfloat16 norm=rms``."""
        extras = "".join(
            f" {text}"
            for text, said in (
                ("weight=float32", self.weight_dtype != self.dtype),
                ("router_bias", self.router_bias),
                (f"norm={self.norm}", self.norm != ""),
                ("input_scale", self.input_scale),
                (f"logits={self.logits_dtype}", self.logits_dtype != "float32"),
                (self.ids_dtype, self.ids_dtype != "int32"),
                ("not invariant", not self.invariant),
                (f"with {', '.join(sorted(self.operands))}", bool(self.operands)),
            )
            if said
        )
        sizes = f"E={self.num_experts} K={self.topk} H={self.hidden_size}"
        return f"gate {self.family} {sizes} {self.dtype}{extras}"
