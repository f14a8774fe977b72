"""Clause 5: wrong arguments are refused by name, before anything is sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from moe_routing.conformance.exchange import _sets, outcomes
from moe_routing.conformance.exchange._check import check
from moe_routing.conformance.requirements import require_refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.exchange.cases import Case, Operands
    from moe_routing.conformance.under_test import BackendUnderTest

TELLTALE = 12345.0
"""An element of the operands, which no error may show."""


@dataclass(frozen=True, slots=True)
class Wrong:
    """A way in which one operand is wrong."""

    argument: str
    what: str
    change: Callable[[Operands], object]


_WRONG = (
    Wrong("hidden", "no tensor", lambda given: given.hidden.tolist()),
    Wrong("hidden", "a vector", lambda given: given.hidden[:, 0]),
    Wrong("hidden", "more tokens than max_tokens", lambda given: given.hidden.repeat(99, 1)),
    Wrong("ids", "of floats", lambda given: given.ids.float()),
    Wrong("ids", "of fewer tokens", lambda given: given.ids[:-1]),
    Wrong("ids", "of another K", lambda given: given.ids.repeat(1, 2)),
    Wrong("weights", "of integers", lambda given: given.weights.int()),
    Wrong("weights", "of another K", lambda given: given.weights[:, :-1]),
    Wrong("scales", "of fewer tokens", lambda given: given.hidden[:-1]),
    Wrong("weights", "on another device", lambda given: given.weights.to("meta")),
)


def _modes(profile: Profile) -> Iterator[Case]:
    yield from _sets.every_mode(profile, dtype="float32", tokens="same")


@check(5, _modes)
def wrong_operands_are_refused_by_name(under_test: BackendUnderTest, case: Case) -> None:
    """A wrong operand is an error that names it and shows no element; the next call is right."""
    world = case.make(under_test.device)
    ep = world.parallel(under_test, topk=case.topk)
    for wrong in _WRONG:
        if "max_tokens" in wrong.what and not case.padded:
            continue
        operands: dict[str, Any] = {
            name: part for name, part in world.mine._asdict().items() if part is not None
        }
        operands["hidden"] = torch.full_like(world.mine.hidden, TELLTALE)
        given = world.mine._replace(hidden=operands["hidden"])
        operands[wrong.argument] = wrong.change(given)
        require_refusal(
            lambda: ep.dispatch(**operands),  # noqa: B023 -- called at once
            wrong.argument,
            f"{wrong.argument} {wrong.what}",
            TELLTALE,
        )
    outcomes.must_be_right(world, outcomes.exchanged(world, ep), "after errors")


@check(5, _modes)
def wrong_results_are_refused_by_name(under_test: BackendUnderTest, case: Case) -> None:
    """Results that are none of what was dispatched are an error; the right ones then are not."""
    world = case.make(under_test.device)
    ep = world.parallel(under_test)
    rows, scales, plan = outcomes.dispatched(world, ep)
    computed = world.computed(rows, plan)
    for wrong in (computed.tolist(), computed[0], computed[:-1], computed.long()):
        require_refusal(lambda: ep.combine(wrong), "rows", "wrong results", TELLTALE)  # type: ignore[arg-type] # noqa: B023 -- that is the point
    made = outcomes.Exchanged(rows, scales, plan, ep.combine(computed))
    outcomes.must_be_right(world, made, "after errors")
