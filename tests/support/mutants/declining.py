"""Clause 0: what the spec accepts and declines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_routing_registry import RejectCode, Verdict
from mutants._mutant import Reference, caught_by

if TYPE_CHECKING:
    from moe_routing_registry import DeviceInfo, RoutingProblem


def _decline(problem: RoutingProblem, device: DeviceInfo) -> Verdict:
    del problem, device
    return Verdict.no(RejectCode.SHAPE, "is for E = 0 only")


@caught_by(
    "it_serves_the_families_that_its_spec_names",
    supports=_decline,
    saying="the backend declines every problem",
)
class DeclinesEverything(Reference):
    """Takes part in nothing, and so fails nothing."""


def _decline_strides(problem: RoutingProblem, device: DeviceInfo) -> Verdict:
    del device
    return (
        Verdict.no(RejectCode.LAYOUT, "reads rows only")
        if problem.layout == "strided"
        else Verdict.yes()
    )


@caught_by(
    "what_it_declines_cannot_be_had",
    "topk_softmax",
    supports=_decline_strides,
    saying="but routes it right",
)
class DeclinesWhatItCan(Reference):
    """Declines strided logits, which it routes as well as any."""


@caught_by(
    "what_it_declines_cannot_be_had",
    "topk_softmax",
    operands=frozenset(),
    saying="takes no operand ids.*but routes it right",
)
class DeclinesRecordsThatItReads(Reference):
    """Does not say that it takes recorded ids."""


@caught_by(
    "what_it_declines_cannot_be_had",
    "topk_softmax",
    supports=_decline_strides,
    saying="takes no keyword `unsupported`",
)
class AsksItsOwnSupportsAgain(Reference):
    """Declines strided logits, and its factory refuses them too.

    So nobody can see that it routes them right.
    """

    def __init__(self, problem: RoutingProblem, device: DeviceInfo) -> None:
        super().__init__(problem, device)
        verdict = _decline_strides(problem, device)
        if not verdict:
            raise NotImplementedError(verdict.reason)


@caught_by(
    "what_it_declines_cannot_be_had",
    "topk_softmax",
    supports=_decline_strides,
    saying="but routes it right",
)
class DeclinesUntilItIsTold(AsksItsOwnSupportsAgain):
    """Asks its support rule again, and routes right when it is told to build all the same."""

    def __init__(
        self, problem: RoutingProblem, device: DeviceInfo, *, unsupported: bool = False
    ) -> None:
        if unsupported:
            Reference.__init__(self, problem, device)
        else:
            super().__init__(problem, device)


@caught_by(
    "what_it_accepts_it_routes",
    "topk_softmax",
    saying="accepts .*, but its kernel raised BackendUnavailableError",
)
class AcceptsEverythingAndRaises(Reference):
    """Says yes to every problem, and then cannot."""

    def __init__(self, problem: RoutingProblem, device: DeviceInfo) -> None:
        super().__init__(problem, device)
        msg = f"no kernel for {problem}"
        raise RuntimeError(msg)
