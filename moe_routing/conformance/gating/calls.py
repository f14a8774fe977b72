"""One call of ``gate``: as users make it, and as a kernel is launched."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from moe_routing.gating import GateOutput, RMSNorm
from moe_routing.reference import gate_oracle
from moe_routing.reference.compare import exact_device

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from moe_routing.conformance.under_test import BackendUnderTest
    from moe_routing.gating import Projection
    from moe_routing.reference.compare import Operands
    from moe_routing_registry import RoutingSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """The arguments of one call."""

    spec: RoutingSpec
    projection: Projection
    topk: int
    operands: Operands
    ids_dtype: torch.dtype
    logits_dtype: torch.dtype
    invariant: bool

    def but(self, **changes: Any) -> Call:  # noqa: ANN401 -- the fields
        """Return the call with some arguments changed."""
        return replace(self, **changes)

    def with_projection(self, **changes: Any) -> Call:  # noqa: ANN401 -- the fields of a projection
        """Return the call with parts of its projection changed."""
        return self.but(projection=self.projection._replace(**changes))

    def rows(self, index: Tensor | slice) -> Call:
        """Return the call on some of its rows; per-token operands follow."""
        operands: Any = dict(self.operands)
        if operands.get("token_ids") is not None:
            operands["token_ids"] = operands["token_ids"][index]
        call = self.with_projection(hidden=self.projection.hidden[index])
        return call.but(operands=operands)

    @property
    def device(self) -> torch.device:
        """The device of all."""
        return self.projection.hidden.device

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of ``Gate.__call__``, by name."""
        hidden, weight, bias, norm_weight, input_scale, eps, multiplier = self.projection
        return {
            "hidden": hidden,
            "router_weight": weight,
            "topk": self.topk,
            "router_bias": bias,
            "norm": None if eps is None else RMSNorm(eps, norm_weight),
            "input_scale": input_scale,
            "input_multiplier": multiplier,
            "ids_dtype": self.ids_dtype,
            "logits_dtype": self.logits_dtype,
            "invariant": self.invariant,
            **self.operands,
        }

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that the call reads, by name."""
        named = {**self.projection._asdict(), **self.operands}
        return {name: t for name, t in named.items() if isinstance(t, torch.Tensor)}

    def gate(self, under_test: BackendUnderTest) -> Callable[..., Any]:
        """Return what users of the backend call."""
        return under_test.router(self.spec).gate

    def made(self, under_test: BackendUnderTest) -> GateOutput:
        """Gate as users do, and return the logits too.

        :raises DeclinedError: the backend declines the problem.
        """
        with under_test.declining():
            made = self.gate(under_test)(**self.arguments, return_logits=True)
        return GateOutput(*made)

    def checked(self, under_test: BackendUnderTest, what: str = "") -> GateOutput:
        """Gate as users do, and hold the outcome against the oracle."""
        # Memory that the allocator hands out next must not happen to hold the right answer.
        shape = (len(self.projection.hidden), len(self.projection.router_weight))
        poison = torch.full(shape, torch.nan, dtype=self.logits_dtype, device=self.device)
        del poison
        made = self.made(under_test)
        self.must_match(made, what)
        return made

    def must_match(self, made: GateOutput, what: str = "") -> None:
        """Raise ``AssertionError`` that says where an output is wrong.

        :param what: stands in front of the message.
        """
        tokens, experts = len(self.projection.hidden), len(self.projection.router_weight)
        columns = self.topk + self.spec.shared_experts
        for name, tensor, shape, dtype in (
            ("weights", made.weights, (tokens, columns), torch.float32),
            ("ids", made.ids, (tokens, columns), self.ids_dtype),
            ("logits", made.logits, (tokens, experts), self.logits_dtype),
        ):
            expected = (shape, dtype, True, self.device)
            got = (tuple(tensor.shape), tensor.dtype, tensor.is_contiguous(), tensor.device)
            _require(expected == got, f"{name}: expected {expected}, got {got}", what)
        home = exact_device(made.logits)
        projection = type(self.projection)(*(_at(part, home) for part in self.projection))
        operands: Any = {name: _at(value, home) for name, value in self.operands.items()}
        there = GateOutput(*(tensor.to(home) for tensor in made))
        problems = gate_oracle.output_problems(self.spec, projection, self.topk, there, **operands)
        _require(not problems, "; ".join(problems), what)


def must_be_same(made: GateOutput, right: GateOutput, what: str) -> None:
    """Require the same bits of weights, ids and logits."""
    for name, one, other in zip(made._fields, made, right, strict=True):
        if one.shape != other.shape or one.dtype != other.dtype:
            _require(False, f"{name}: expected {_said(other)}, got {_said(one)}", what)  # noqa: FBT003 -- it is wrong
        wrong = (bits_of(one) != bits_of(other)).any(-1)
        _require(not wrong.any(), f"{name} has other bits in {int(wrong.sum())} rows", what)


def bits_of(tensor: Tensor) -> Tensor:
    """Return the bits of numbers, as integers."""
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize])


def _said(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _require(condition: object, problem: str, what: str) -> None:
    if not condition:
        raise AssertionError(f"{what}: {problem}" if what else problem)


def _at(value: Any, device: torch.device) -> Any:  # noqa: ANN401 -- a tensor or a number
    return value.detach().to(device) if isinstance(value, torch.Tensor) else value
