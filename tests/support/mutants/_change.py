"""Changes of the product: what it does for every backend, no backend can do wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class Change:
    """A function of the product that is replaced.

    :ivar operation: whose contract has the check.
    :ivar caught_by: name of the check that must see it.
    :ivar saying: regular expression of what the check must say.
    :ivar home: the module.
    :ivar function: its name there.
    :ivar made: makes the wrong function from the right one.
    """

    operation: str
    caught_by: str
    saying: str
    home: Any
    function: str
    made: Callable[[Callable[..., Any]], Callable[..., Any]]

    @property
    def name(self) -> str:
        """Name for test ids."""
        return self.made.__name__.strip("_")


def elements_are_shown(_right: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``refusal``."""
    return lambda name, expected, value: f"{name}: expected {expected}, got {value}"


def no_name_in_front(right: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``refusal``."""
    return lambda name, expected, value: right(name, expected, value).partition(": ")[2]
