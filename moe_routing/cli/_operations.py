"""Problems of operations that commands take by name, as ``plan``."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING

from moe_routing.cli._show import UsageError

if TYPE_CHECKING:
    from typing import Any

    from moe_routing_registry import Problem


def sized(operation: str, **sizes: object) -> Problem:
    """Return the example of an operation, with the sizes that were given.

    :param sizes: by the name of their option; ``None`` where it was not given.
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
        raise UsageError(str(error)) from error
    return made
