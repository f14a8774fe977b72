"""Cases of ``gate``: made from a few words, the same on every machine."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from moe_routing.conformance import cases as routing
from moe_routing.conformance.gating.calls import Call
from moe_routing.conformance.variants import VARIANTS
from moe_routing.gating import GateProblem, Projection

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Generator, Tensor

    from moe_routing.gating.problem import Norm
    from moe_routing_registry import RoutingSpec

FACTORS = ("router_bias", "norm", "norm_weight", "input_scale", "multiplier")
"""What may stand in front of the logits."""
_VECTORS = (torch.float32, torch.bfloat16, torch.float64, torch.float16)


def _normal(tokens: int, columns: int, generator: Generator) -> Tensor:
    return torch.randn(tokens, columns, generator=generator)


def _outlier(tokens: int, columns: int, generator: Generator) -> Tensor:
    """Return rows whose largest value is far above the others, as models have."""
    rows = _normal(tokens, columns, generator)
    return torch.where(torch.arange(columns) == columns // 2, rows * 3000, rows)


def _cancelling(tokens: int, columns: int, generator: Generator) -> Tensor:
    """Return rows whose terms nearly cancel, so that the order of summation shows."""
    rows = _normal(tokens, columns, generator)
    magnitudes = torch.exp2(torch.randint(-6, 7, (columns,), generator=generator).float())
    return rows * magnitudes


def _tiny(tokens: int, columns: int, generator: Generator) -> Tensor:
    return _normal(tokens, columns, generator) * 2.0**-14


def _large(tokens: int, columns: int, generator: Generator) -> Tensor:
    """Return rows of which some logits are too large for float16, and none for float32."""
    return (_normal(tokens, columns, generator) * 60000).clamp(-60000, 60000)


def _integers(tokens: int, columns: int, generator: Generator) -> Tensor:
    """Return rows whose sums are often halfway between two numbers of a shorter dtype."""
    return torch.randint(-8, 9, (tokens, columns), generator=generator).float()


HIDDEN: dict[str, Callable[[int, int, Generator], Tensor]] = {
    "normal": _normal,
    "outlier": _outlier,
    "cancelling": _cancelling,
    "tiny": _tiny,
    "large": _large,
    "integers": _integers,
}
PLANS: dict[str, dict[str, Any]] = {
    "sorted": {},
    "blocks": {"block": 4},
    "long_blocks": {"block": 64},
    "drops": {"capacity": 3},
    "masked": {"capacity": 3, "masked": True},
    "drops_least": {"capacity": 3, "drop": "least_weight"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One call of ``gate`` in words.

    :ivar variant: key of ``VARIANTS``.
    :ivar columns: H.
    :ivar hidden: key of ``HIDDEN``.
    :ivar dtype: of the hidden states.
    :ivar float32_weight: whether the router weight is float32.
    :ivar factors: some of ``FACTORS``.
    :ivar layout: of hidden states, router weight and vectors, as of ``routing.Case``.
    :ivar valid: as of ``routing.Case``, like ``mapped``.
    :ivar plan: key of ``PLANS``: what a plan is asked for, if there is one.
    :ivar turn: another number gives other values of the same shapes.
    """

    variant: str = "topk_softmax"
    num_experts: int = 64
    topk: int = 8
    num_tokens: int = 33
    columns: int = 300
    hidden: str = "normal"
    dtype: str = "bfloat16"
    float32_weight: bool = False
    factors: tuple[str, ...] = ()
    layout: routing.Layout = "contiguous"
    logits_dtype: str = "float32"
    ids_dtype: str = "int32"
    invariant: bool = True
    valid: Literal["all", "int", "tensor"] = "all"
    mapped: bool = False
    plan: str = ""
    turn: int = 0

    @property
    def spec(self) -> RoutingSpec:
        """The maths of routing."""
        return VARIANTS[self.variant]

    @property
    def family(self) -> str:
        """Name of the family, for the report's matrix."""
        return self.variant.partition("/")[0]

    @property
    def id(self) -> str:
        """A name for test ids: only what differs from the usual is in it."""
        words = [self.variant.replace("/", "."), f"E{self.num_experts}", f"K{self.topk}"]
        words += [f"T{self.num_tokens}", f"H{self.columns}", self.dtype]
        usual = ("normal", "contiguous", "int32")
        words += [w for w in (self.hidden, self.layout, self.ids_dtype) if w not in usual]
        words += ["float32_weight"] * self.float32_weight + list(self.factors)
        words += [f"logits_{self.logits_dtype}"] * (self.logits_dtype != "float32")
        words += [f"valid_{self.valid}"] * (self.valid != "all") + ["mapped"] * self.mapped
        words += ["any_order"] * (not self.invariant)
        words += [f"plan_{self.plan}"] * bool(self.plan)
        words += [f"turn{self.turn}"] * bool(self.turn)
        return "-".join(words)

    def but(self, **changes: Any) -> Case:  # noqa: ANN401 -- the fields above
        """Return the case with some words changed."""
        return replace(self, **changes)

    @property
    def problem(self) -> GateProblem:
        """What a backend is asked to build for the call."""
        plain: Norm = "rms" if "norm" in self.factors else ""
        return GateProblem(
            spec=self.spec,
            num_experts=self.num_experts,
            topk=self.topk,
            hidden_size=self.columns,
            dtype=self.dtype,
            float32_weight=self.float32_weight and self.dtype != "float32",
            router_bias="router_bias" in self.factors,
            norm="rms_weight" if "norm_weight" in self.factors else plain,
            input_scale="input_scale" in self.factors,
            logits_dtype=self.logits_dtype,
            ids_dtype=self.ids_dtype,
            invariant=self.invariant,
        )

    def generator(self) -> Generator:
        """Return a generator that is seeded by the case's id."""
        return torch.Generator().manual_seed(zlib.crc32(self.id.encode()))

    def make(self, device: torch.device) -> Call:
        """Make the call on the device."""
        generator = self.generator()
        dtype: torch.dtype = getattr(torch, self.dtype)
        weight_dtype: torch.dtype = getattr(torch, self.problem.weight_dtype)
        shape = (self.num_experts, self.columns)
        # Logits of standard deviation 2, whatever H is.
        weight = torch.randn(shape, generator=generator) * (2 / self.columns**0.5)
        hidden = HIDDEN[self.hidden](self.num_tokens, self.columns, generator)
        if self.hidden == "integers":
            weight = torch.randint(-3, 4, shape, generator=generator).float()
        elif self.hidden == "outlier":
            weight[:, self.columns // 2] = 0.0
        projection = Projection(
            routing.laid_out(hidden.to(device, dtype), self.layout),
            routing.laid_out(weight.to(device, weight_dtype), self.layout),
            self._vector("router_bias", self.num_experts, generator, device),
            self._vector("norm_weight", self.columns, generator, device),
            self._vector("input_scale", self.columns, generator, device),
            eps=1e-6 if {"norm", "norm_weight"} & set(self.factors) else None,
            multiplier=self.columns**-0.5 if "multiplier" in self.factors else 1.0,
        )
        words = routing.Case(
            variant=self.variant, num_experts=self.num_experts, topk=self.topk,
            valid=self.valid, mapped=self.mapped,
        )  # fmt: skip
        operands = routing.make_operands(words, self.num_tokens, generator)
        return Call(
            spec=self.spec,
            projection=projection,
            topk=self.topk,
            operands=routing.on_device(operands, device),
            ids_dtype=getattr(torch, self.ids_dtype),
            logits_dtype=getattr(torch, self.logits_dtype),
            invariant=self.invariant,
        )

    def _vector(
        self, name: str, length: int, generator: Generator, device: torch.device
    ) -> Tensor | None:
        if name not in self.factors:
            return None
        dtype = _VECTORS[int(torch.randint(len(_VECTORS), (1,), generator=generator))]
        drawn = torch.randn(length, generator=generator) + (name != "router_bias")
        vector = drawn.to(device, dtype)
        if self.layout == "contiguous":
            return vector
        return torch.stack((vector, vector.neg()), dim=1)[:, 0]
