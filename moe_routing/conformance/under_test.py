"""The backend under test on one device, used as users use it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

import moe_routing
from moe_routing import RoutingOutput
from moe_routing._registry import registry
from moe_routing.probing import probe
from moe_routing.reference.compare import compare
from moe_routing_registry import BackendUnavailableError, RejectCode, Request

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

    from moe_routing.conformance.cases import Call
    from moe_routing_registry import BackendSpec, Problem, RoutingSpec
    from moe_routing_registry.report import Rejection

GAP_OF = {
    RejectCode.FAMILY: "family",
    RejectCode.DTYPE: "dtype",
    RejectCode.SHAPE: "shape",
    RejectCode.LAYOUT: "layout",
    RejectCode.OPERANDS: "operands",
    RejectCode.GROUP: "group",
    RejectCode.INVARIANCE: "invariance",
    RejectCode.TRAINING: "gradients",
}
"""The capability that a backend lacks if it declines a problem with that code.

It may do so on a device that it is for.
"""


class DeclinedError(Exception):
    """The backend declines the problem: not wrong, but shown in the report."""

    def __init__(self, rejection: Rejection) -> None:
        """Keep the rejection."""
        self.rejection = rejection
        super().__init__(rejection.verdict.reason)


class NotApplicableError(Exception):
    """There is nothing to check: no gap is declared, say."""


class NotRunError(Exception):
    """The check cannot be run here: it needs another device, a second one, or more memory."""


@dataclass(frozen=True, slots=True)
class BackendUnderTest:
    """A backend on a device."""

    backend: str
    device: torch.device

    @property
    def spec(self) -> BackendSpec:
        """The backend's spec."""
        return registry().backends[self.backend]

    def why_not(self, problems: Iterable[Problem]) -> Rejection | None:
        """Return why the backend cannot be used on the device, or ``None`` where it can.

        The reason holds for whatever is asked of the backend.
        """
        first = None
        for problem in problems:
            rejection = self.rejection(problem)
            if rejection is None or rejection.verdict.code in GAP_OF:
                return None
            first = first or rejection
        return first

    def rejection(self, problem: Problem) -> Rejection | None:
        """Return the backend's rejection of a problem, or ``None`` where it accepts."""
        request = Request(backend=self.backend, asked_by="argument")
        return registry().resolve(problem, probe(self.device), request).rejection(self.backend)

    def kernel(self, problem: Problem) -> Any:  # noqa: ANN401 -- each operation has its own type
        """Build the backend's kernel for a problem of any operation.

        :raises DeclinedError: the backend declines the problem.
        """
        rejection = self.rejection(problem)
        if rejection is not None:
            raise DeclinedError(rejection)
        return registry().build(self.backend, problem, probe(self.device))

    def router(self, spec: RoutingSpec) -> moe_routing.Router:
        """Return the router that a user of this backend gets."""
        return moe_routing.get_router(spec, backend=self.backend)

    def route(self, call: Call, out: RoutingOutput | None = None) -> RoutingOutput:
        """Route a call.

        :raises DeclinedError: the backend declines the problem.
        """
        # Memory that the allocator hands out next must not happen to hold the right answer.
        columns = call.topk + call.spec.shared_experts
        poison = outputs(len(call.logits), columns, call.ids_dtype, self.device)
        poison.weights.fill_(torch.nan)
        poison.ids.fill_(-7)
        del poison
        with self.declining():
            return self.router(call.spec)(
                call.logits, call.topk, ids_dtype=call.ids_dtype, out=out, **call.operands
            )

    @contextlib.contextmanager
    def declining(self) -> Iterator[None]:
        """Raise ``DeclinedError`` for a call inside the block that the backend declines."""
        try:
            yield
        except BackendUnavailableError as error:
            rejection = error.report.rejection(self.backend)
            if rejection is None or rejection.verdict.code not in GAP_OF:
                raise
            raise DeclinedError(rejection) from error

    def check(self, call: Call) -> RoutingOutput:
        """Route a call and hold the outcome against the oracle."""
        output = self.route(call)
        must_match(call, output)
        return output


def must_match(call: Call, output: RoutingOutput) -> None:
    """Raise ``AssertionError`` if the output is wrong.

    The error says what is wrong, and the kind of the rows where rows are of a kind.
    """
    if output.ids.dtype != call.ids_dtype:
        msg = f"ids: expected dtype {call.ids_dtype}, got {output.ids.dtype}"
        raise AssertionError(msg)
    for name, tensor in zip(("weights", "ids"), output, strict=True):
        if not tensor.is_contiguous():
            msg = (
                f"{name}: expected a contiguous tensor, "
                f"got strides {tensor.stride()} of shape {list(tensor.shape)}"
            )
            raise AssertionError(msg)
    problems = compare(
        call.spec, call.logits, call.topk, RoutingOutput(*output), **call.operands
    ).problems
    if problems:
        raise AssertionError("; ".join(_with_label(problem, call.labels) for problem in problems))


def _with_label(problem: str, labels: list[str]) -> str:
    row, colon, rest = problem.partition(":")
    number = row.removeprefix("row ")
    return f"{row} ({labels[int(number)]}){colon}{rest}" if labels and number.isdigit() else problem


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits, NaN included."""
    if a.dtype == torch.float32:
        a, b = a.view(torch.int32), b.view(torch.int32)
    return torch.equal(a, b)


def outputs(
    num_tokens: int, columns: int, ids_dtype: torch.dtype, device: torch.device
) -> RoutingOutput:
    """Allocate outputs, unfilled."""
    return RoutingOutput(
        torch.empty(num_tokens, columns, dtype=torch.float32, device=device),
        torch.empty(num_tokens, columns, dtype=ids_dtype, device=device),
    )
