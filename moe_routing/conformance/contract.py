"""``Contract``: the clauses of one operation, and the checks that hold a backend to them.

Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Protocol

from moe_routing._registry import registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.clauses import Clause
    from moe_routing.conformance.under_test import BackendUnderTest
    from moe_routing_registry import Problem


class Named(Protocol):
    """A case: whatever a check takes after the backend, with a name and a family."""

    @property
    def id(self) -> str:
        """Name for test ids."""
        ...

    @property
    def family(self) -> str:
        """Name of the routing family, for the report's matrix; ``""`` for a case without one."""
        ...


@dataclass(frozen=True, slots=True)
class Check:
    """A named check of one clause.

    :ivar clause: the clause's number.
    :ivar name: the function's name, which says what it checks.
    :ivar sentence: the first line of its docstring.
    :ivar run: the function; raises ``AssertionError``, ``DeclinedError`` or ``NotApplicableError``.
    :ivar cases: the cases of a profile.
    :ivar capability: what a backend may declare a gap in, to be excused from it.
    """

    clause: int
    name: str
    sentence: str
    run: Callable[[BackendUnderTest, Any], None]
    cases: Callable[[Profile], Iterable[Named]]
    capability: str = ""

    def items(self, profile: Profile) -> Iterator[Item]:
        """Yield the check with each of its cases."""
        for case in self.cases(profile):
            yield Item(self, case)


@dataclass(frozen=True, slots=True)
class Item:
    """One check on one case."""

    check: Check
    case: Named

    @property
    def id(self) -> str:
        """The clause's number, the check and the case."""
        return f"{self.check.clause:02d}-{self.check.name}-{self.case.id}"


@dataclass(frozen=True, slots=True)
class Contract:
    """What every backend that has a factory for an operation must pass.

    :ivar clauses: the clauses by number.
    :ivar problems: returns problems of ordinary sizes. A backend that declines each of them, and
        not for its family, dtype, size, layout or gradients, cannot be used on the device at all.
    :ivar checks: what ``check`` entered.
    :ivar declinable: returns problems of every kind that a backend may decline; those of
        ``problems`` where it is ``None``.

    >>> contract = Contract({}, list)
    >>> @contract.check(1, cases=lambda profile: [])
    ... def sums_are_exact(under_test, case):
    ...     '''Sums are exact.'''
    >>> [check.sentence for check in contract.checks]
    ['Sums are exact.']
    """

    clauses: Mapping[int, Clause]
    problems: Callable[[], Iterable[Problem]]
    checks: list[Check] = field(default_factory=list)
    declinable: Callable[[], Iterable[Problem]] | None = None

    def every_kind(self) -> Iterable[Problem]:
        """Return the problems by which it shows what a backend declines."""
        return (self.declinable or self.problems)()

    def check(
        self, clause: int, cases: Callable[[Profile], Iterable[Named]], *, capability: str = ""
    ) -> Callable[
        [Callable[[BackendUnderTest, Any], None]], Callable[[BackendUnderTest, Any], None]
    ]:
        """Enter a function as a check of a clause."""

        def enter(
            function: Callable[[BackendUnderTest, Any], None],
        ) -> Callable[[BackendUnderTest, Any], None]:
            sentence = (function.__doc__ or "").partition("\n")[0]
            self.checks.append(
                Check(clause, function.__name__, sentence, function, cases, capability)
            )
            return function

        return enter

    def items(self, profile: Profile) -> Iterator[Item]:
        """Yield every check on each of its cases, clause by clause."""
        for check in sorted(self.checks, key=lambda check: check.clause):
            yield from check.items(profile)


def contract_of(operation: str) -> Contract:
    """Import the contract of an operation.

    :raises UnknownNameError: there is no such operation.
    """
    contract: Contract = resolve_name(registry().operation(operation).contract)
    return contract
