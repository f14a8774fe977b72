"""What a check is: a function of a backend and a case that raises ``AssertionError`` if the backend breaks its clause."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.under_test import BackendUnderTest


class Named(Protocol):
    """What a check is given beside the backend: anything with a name and a family."""

    @property
    def id(self) -> str:
        """Name for test ids."""
        ...

    @property
    def family(self) -> str:
        """Name of the family, for the report's matrix."""
        ...


CHECKS: list[Check] = []
"""Every check, in the order of the clauses once all modules are imported."""


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


def check(
    clause: int, cases: Callable[[Profile], Iterable[Named]], *, capability: str = ""
) -> Callable[[Callable[[BackendUnderTest, Any], None]], Callable[[BackendUnderTest, Any], None]]:
    """Enter a function into ``CHECKS``."""

    def enter(function: Callable[[BackendUnderTest, Any], None]) -> Callable[[BackendUnderTest, Any], None]:
        sentence = (function.__doc__ or "").partition("\n")[0]
        CHECKS.append(Check(clause, function.__name__, sentence, function, cases, capability))
        return function

    return enter


def require(condition: object, problem: str) -> None:
    """Raise ``AssertionError``; an ``assert`` statement would vanish under ``python -O``."""
    if not condition:
        raise AssertionError(problem)
