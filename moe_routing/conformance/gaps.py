"""Clause 0 of every operation: a gap that a spec declares is one.

A spec's gaps are about all operations that its backend computes, so a gap is real if it is real in
one of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_routing.conformance.contract import contract_of
from moe_routing.conformance.under_test import GAP_OF, NotApplicableError, NotRunError
from moe_routing_registry.backend_spec import CAPABILITIES
from moe_routing_registry.containment import PluginFailure, contained

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.contract import Contract, Item
    from moe_routing.conformance.under_test import BackendUnderTest


@dataclass(frozen=True, slots=True)
class Gap:
    """A capability that a spec may declare a gap in."""

    id: str
    family: str = ""


def every_gap(_profile: Profile) -> list[Gap]:
    """Return the cases of a check of gaps."""
    return [Gap(capability) for capability in CAPABILITIES]


def must_be_real(under_test: BackendUnderTest, gap: Gap) -> None:
    """Require that what the spec declares a gap in is declined, or tried and found to fail.

    :raises NotApplicableError: the spec declares no such gap, or it cannot be tried here.
    """
    if gap.id not in under_test.spec.gaps:
        msg = "the spec declares no such gap"
        raise NotApplicableError(msg)
    contracts = [contract_of(operation) for operation in under_test.spec.factories]
    if gap.id in GAP_OF.values():
        if not any(_declines(under_test, contract, gap) for contract in contracts):
            msg = f"declares a gap in {gap.id}, but declines nothing for it"
            raise AssertionError(msg)
        return
    tried = [
        failed
        for contract in contracts
        for item in _items(contract, gap)
        if (failed := _fails(under_test, item)) is not None
    ]
    if not tried:
        msg = f"{gap.id} cannot be tried here"
        raise NotApplicableError(msg)
    if not any(tried):
        msg = f"declares a gap in {gap.id}, but passes every check of it"
        raise AssertionError(msg)


def _declines(under_test: BackendUnderTest, contract: Contract, gap: Gap) -> bool:
    codes = {code for code, name in GAP_OF.items() if name == gap.id}
    rejections = map(under_test.rejection, contract.every_kind())
    return any(rejection and rejection.verdict.code in codes for rejection in rejections)


def _items(contract: Contract, gap: Gap) -> Iterator[Item]:
    for check in contract.checks:
        if check.capability == gap.id:
            yield from check.items("smoke")


def _fails(under_test: BackendUnderTest, item: Item) -> bool | None:
    """Tell whether a check fails, ``None`` where it cannot tell."""
    try:
        with contained("the check", NotApplicableError, NotRunError):
            item.check.run(under_test, item.case)
    except (NotApplicableError, NotRunError):
        return None
    except PluginFailure:  # any failure is one
        return True
    return False
