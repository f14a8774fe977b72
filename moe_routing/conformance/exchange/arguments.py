"""Clause 5: wrong arguments are refused by name, before anything is sent."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from moe_routing.conformance.exchange import _sets, outcomes, ranks
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
    with ranks.to_the_end() as hold:
        for wrong in _WRONG:
            if "max_tokens" in wrong.what and not case.padded:
                continue
            given = world.mine._replace(hidden=torch.full_like(world.mine.hidden, TELLTALE))
            operands: dict[str, Any] = given._asdict()
            operands[wrong.argument] = wrong.change(given)
            call = functools.partial(ep.dispatch, **operands)
            what = f"{wrong.argument} {wrong.what}"
            hold(require_refusal, call, wrong.argument, what, TELLTALE)
        made = outcomes.exchanged(world, ep)
        hold(outcomes.must_be_right, world, made, "after errors")


@check(5, _modes)
def wrong_results_are_refused_by_name(under_test: BackendUnderTest, case: Case) -> None:
    """Results that are none of what was dispatched are an error; the right ones then are not."""
    world = case.make(under_test.device)
    ep = world.parallel(under_test)
    rows, scales, plan = outcomes.dispatched(world, ep)
    computed = world.computed(rows, plan)
    with ranks.to_the_end() as hold:
        for wrong in (computed.tolist(), computed[0], computed[:-1], computed.long()):
            call = functools.partial(ep.combine, wrong)  # type: ignore[arg-type] # that is the point
            hold(require_refusal, call, "rows", "wrong results", TELLTALE)
        made = outcomes.Exchanged(rows, scales, plan, ep.combine(computed))
        hold(outcomes.must_be_right, world, made, "after errors")
