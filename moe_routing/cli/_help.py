"""Help that teaches: every command's help ends in examples."""

from __future__ import annotations

from typing import Any

from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from moe_routing.cli._show import command, console

Examples = tuple[tuple[str, str], ...]


def show_examples(examples: Examples) -> None:
    """Print examples, each command whole on its own line, what it is for on the next."""
    screen = console()
    screen.print(Text("Examples", style="bold"))
    for line, meaning in examples:
        command(screen, line, indent=2)
        screen.print(Text(f"      {meaning}"), soft_wrap=True)
    screen.print()


class Group(TyperGroup):
    """The program itself."""

    def format_help(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401 -- click's classes, or typer's copy of them
        """Print the help and the examples."""
        super().format_help(ctx, formatter)
        show_examples(
            (
                ("moe-routing doctor", "what is here, what is missing, and the command that mends it"),
                ("moe-routing list deepseek", "the names that get_router takes, with their formulas"),
                ("moe-routing explain gemma4 --device cuda:0", "which backend would route there, and why"),
            )
        )


def taught(*examples: tuple[str, str]) -> type[TyperCommand]:
    """Return a class of command whose help ends in these examples: pairs of a command line and what it is for."""

    class Taught(TyperCommand):
        def format_help(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401 -- likewise
            super().format_help(ctx, formatter)
            show_examples(examples)

    return Taught
