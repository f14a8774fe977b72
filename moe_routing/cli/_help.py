"""Help that teaches: every command's help ends in examples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from moe_routing.cli._show import console, reserved_stdout

if TYPE_CHECKING:
    from collections.abc import Callable

_BOXED_FROM = 70
"""Columns that typer's boxes around options need."""
_WHOLE = 10_000
"""Characters within which every command's summary is whole."""
Examples = tuple[tuple[str, str], ...]


class Group(TyperGroup):
    """The program itself."""

    def format_help(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401 -- click's or typer's
        """Print the help and the examples."""
        examples = (
            ("moe-routing doctor", "what is here, what is missing, and the command that fixes it"),
            ("moe-routing list deepseek", "the names that get_router takes, with their formulas"),
            (
                "moe-routing explain gemma4 --device cuda:0",
                "which backend would route there, and why",
            ),
        )
        _teach(self, super().format_help, ctx, formatter, examples)


def taught(*examples: tuple[str, str]) -> type[TyperCommand]:
    """Return a class of command whose help ends in these examples.

    Pairs of a command line and what it is for.

    While such a command runs, stdout is reserved for its answer.
    """

    class Taught(TyperCommand):
        def format_help(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401 -- likewise
            _teach(self, super().format_help, ctx, formatter, examples)

        def get_short_help_str(self, limit: int = _WHOLE) -> str:  # noqa: ARG002 -- click's limit cuts words off
            return super().get_short_help_str(_WHOLE)

        def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 -- likewise
            with reserved_stdout():
                return super().invoke(ctx)

    return Taught


def _teach(
    command: TyperCommand | TyperGroup,
    format_help: Callable[[Any, Any], None],
    ctx: Any,  # noqa: ANN401 -- likewise
    formatter: Any,  # noqa: ANN401 -- likewise
    examples: Examples,
) -> None:
    """Print the help, then the examples.

    Each command is on one line, unbroken; its purpose is on the next line.
    """
    lines = [
        "Examples",
        *(
            f"{indent}{text}"
            for pair in examples
            for indent, text in zip(("  ", "      "), pair, strict=True)
        ),
        "",
    ]
    screen = console()
    if screen.width < _BOXED_FROM:  # typer's boxes would cut words off
        command.rich_markup_mode = None
        format_help(ctx, formatter)
        formatter.write("\n" + "\n".join(lines))
        return
    format_help(ctx, formatter)
    for number, line in enumerate(lines):
        style = "bold" if number == 0 else "bold cyan" if number % 2 else ""
        screen.print(Text(line, style=style), soft_wrap=True)
