"""Problems of operations that commands take by name, as ``plan``."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING

from moe_routing.cli._show import UsageError

if TYPE_CHECKING:
    from typing import Any

    from moe_routing_registry import Problem

_OPTIONS = {"modes": "--mode", "dtypes": "--dtype"}
"""Options that are not called as their field."""


def sized(operation: str, **sizes: object) -> Problem:
    """Return the example of an operation, with the sizes that were given.

    :param sizes: by the name of their option; ``None`` where it was not given.
    :raises UsageError: the operation has no such size, or a size is out of its range.
    """
    from moe_routing._registry import registry

    problem: Any = registry().example(operation)
    known = {field.name for field in fields(problem)} if is_dataclass(problem) else set()
    given = {name: value for name, value in sizes.items() if value is not None}
    for name in sorted(given.keys() - known):
        msg = f"--{name.replace('_', '-')}: the operation {operation!r} has none"
        raise UsageError(msg)
    if "block" in given:  # in the other layouts there are no blocks
        given["layout"] = "blocks"
    try:
        made: Problem = replace(problem, **given) if given else problem
    except ValueError as error:
        raise by_option(error) from error
    return made


def by_option(error: ValueError) -> UsageError:
    """Name the option instead of the field.

    What is no field, an environment variable for example, keeps its name.
    """
    field, colon, rest = str(error).partition(": ")
    if field.islower() and field.isidentifier():
        field = _OPTIONS.get(field, f"--{field.replace('_', '-')}")
    return UsageError(f"{field}{colon}{rest}")
