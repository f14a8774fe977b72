"""One call of ``permute`` or ``combine``: as users make it, and as a kernel is launched."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

import moe_routing
from moe_routing.conformance.permutation import outcomes, values
from moe_routing.permutation import CombineProblem, PermuteProblem
from moe_routing.reference import permutation_oracle as oracle

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from typing_extensions import Self

    from moe_routing.conformance.under_test import BackendUnderTest
    from moe_routing.planning import DispatchPlan
    from moe_routing.planning.problem import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """The arguments of one call.

    :cvar names: of what the operation returns.
    """

    names: ClassVar[tuple[str, ...]]
    plan: DispatchPlan

    def but(self, **changes: Any) -> Self:  # noqa: ANN401 -- the fields
        """Return the call with some arguments changed."""
        return replace(self, **changes)

    @property
    def function(self) -> Callable[..., Any]:
        """The operation."""
        raise NotImplementedError

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of the operation, by name."""
        raise NotImplementedError

    @property
    def problem(self) -> Any:  # noqa: ANN401 -- each operation has its own type
        """What a backend is asked to build for the call."""
        raise NotImplementedError

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """Tensors on the device of meta, of the shapes that a kernel writes."""
        raise NotImplementedError

    def launch(self, kernel: Any, out: tuple[Tensor, ...]) -> None:  # noqa: ANN401 -- as above
        """Call a kernel as its protocol says."""
        raise NotImplementedError

    def must_match(self, made: tuple[Tensor, ...], what: str = "") -> None:
        """Raise ``AssertionError`` that says where a result is wrong.

        :param what: stands in front of the message.
        """
        raise NotImplementedError

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that the call reads, by name."""
        parts = {f"plan.{name}": part for name, part in self.plan._asdict().items()}
        named = {**self.arguments, **parts}
        return {name: t for name, t in named.items() if isinstance(t, torch.Tensor)}

    @property
    def device(self) -> torch.device:
        """The device of all."""
        return self.plan.order.device

    @property
    def topk(self) -> int:
        """K."""
        return self.plan.inverse.shape[1]

    @property
    def layout(self) -> Layout:
        """The plan's."""
        if self.plan.order.dim() > 1:
            return "masked"
        return "sorted" if self.plan.block_experts is None else "blocks"

    def copy_(self, other: Call) -> None:
        """Write the tensors of another call of the same shapes over those of this one."""
        for name, tensor in other.tensors.items():
            values.put(tensor, self.tensors[name])

    def made(self, under_test: BackendUnderTest) -> tuple[Tensor, ...]:
        """Call the operation as users do.

        :raises DeclinedError: the backend declines the problem.
        """
        with under_test.declining():
            result = self.function(**self.arguments, backend=under_test.backend)
        return (result,) if isinstance(result, torch.Tensor) else tuple(result)

    def checked(self, under_test: BackendUnderTest, what: str = "") -> tuple[Tensor, ...]:
        """Call the operation as users do, and hold the result against the oracle."""
        # Memory that the allocator hands out next must not happen to hold the right answer.
        poison = [values.around(like, like.shape, self.device) for like in self.outputs]
        del poison
        result = self.made(under_test)
        self.must_match(result, what)
        return result


@dataclass(frozen=True, slots=True, kw_only=True)
class PermuteCall(Call):
    """The arguments of ``permute``."""

    names: ClassVar[tuple[str, ...]] = ("rows", "scales")
    hidden: Tensor
    quantize: str = ""

    @property
    def function(self) -> Callable[..., Any]:
        """``moe_routing.permute``."""
        return moe_routing.permute

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of ``permute``, by name."""
        return {"hidden": self.hidden, "plan": self.plan, "quantize": self.quantize or None}

    @property
    def problem(self) -> PermuteProblem:
        """What a backend is asked to build for the call."""
        return PermuteProblem(
            topk=self.topk,
            dtype=str(self.hidden.dtype).removeprefix("torch."),
            layout=self.layout,
            quantize="float8_e4m3fn" if self.quantize else "",
        )

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """Rows, and scales of rows that are quantized."""
        places, columns = tuple(self.plan.order.shape), self.hidden.shape[1]
        if not self.quantize:
            return (_meta((*places, columns), self.hidden.dtype),)
        groups = -(-columns // oracle.GROUP)
        return (
            _meta((*places, columns), torch.float8_e4m3fn),
            _meta((*places, groups), torch.float32),
        )

    def launch(self, kernel: Any, out: tuple[Tensor, ...]) -> None:  # noqa: ANN401 -- a PermuteKernel
        """Call a kernel as its protocol says."""
        rows, *scales = (some.view(-1, some.shape[-1]) for some in out)
        kernel(self.hidden, self.plan, rows, **({"scales": scales[0]} if scales else {}))

    def must_match(self, made: tuple[Tensor, ...], what: str = "") -> None:
        """Raise ``AssertionError`` unless all bits of all places that count are right."""
        plan = self.plan
        of_tokens = oracle.quantize(self.hidden) if self.quantize else (self.hidden,)
        masked = self.layout == "masked"
        full = ~oracle.is_empty(plan) if masked else None
        front = f"{what}: " if what else ""
        for name, some, like, rows in zip(self.names, made, self.outputs, of_tokens, strict=False):
            outcomes.must_be_like(front + name, some, like, self.device)
            outcomes.must_have_bits(
                front + name, some, oracle.permute(rows, plan), only=full,
                any_nan=bool(self.quantize),
            )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class CombineCall(Call):
    """The arguments of ``combine``."""

    names: ClassVar[tuple[str, ...]] = ("out",)
    rows: Tensor
    weights: Tensor | None

    @property
    def function(self) -> Callable[..., Any]:
        """``moe_routing.combine``."""
        return moe_routing.combine

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of ``combine``, by name."""
        return {"rows": self.rows, "plan": self.plan, "weights": self.weights}

    @property
    def problem(self) -> CombineProblem:
        """What a backend is asked to build for the call."""
        weights = "" if self.weights is None else str(self.weights.dtype).removeprefix("torch.")
        dtype = str(self.rows.dtype).removeprefix("torch.")
        return CombineProblem(topk=self.topk, dtype=dtype, weights=weights)

    @property
    def matrix(self) -> Tensor:
        """The rows ``[P, H]``, also of a masked plan."""
        return self.rows if self.rows.dim() == 2 else self.rows.flatten(0, 1)  # noqa: PLR2004 -- a matrix

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """The sum of each token."""
        return (_meta((self.plan.inverse.shape[0], self.rows.shape[-1]), self.rows.dtype),)

    def launch(self, kernel: Any, out: tuple[Tensor, ...]) -> None:  # noqa: ANN401 -- a CombineKernel
        """Call a kernel as its protocol says."""
        kernel(self.matrix, self.plan, self.weights, *out)

    def must_match(self, made: tuple[Tensor, ...], what: str = "") -> None:
        """Raise ``AssertionError`` unless each element is what float32 can give."""
        name = f"{what}: out" if what else "out"
        (out,), (like,) = made, self.outputs
        outcomes.must_be_like(name, out, like, self.device)
        between = oracle.combine(self.matrix, self.plan, self.weights)
        outcomes.must_lie_between(name, out, between)


def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
