"""What every command needs to show something: a console, tables, commands to copy, errors."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterable

    from moe_routing_registry import UnknownNameError

_UNLIMITED = 100_000
_FEW = 12
STATUS_STYLES = {"ok": "green", "warning": "yellow", "problem": "red", "skipped": "dim"}
_MARKS = {"ok": "✓", "warning": "!", "problem": "✗", "skipped": "-"}
_ASCII_MARKS = {"ok": "+", "warning": "!", "problem": "x", "skipped": "-"}
STATE_STYLES = {"selected": "green", "available": "cyan", "rejected": "yellow", "unknown": "dim"}


class UsageError(Exception):
    """The command line itself is wrong; shown as one line on stderr, exit code 2."""


class Unusable(Exception):  # noqa: N818 -- the tool works; what was asked for does not
    """What was asked for cannot be used here; shown as one line on stderr, exit code 1."""


def console() -> Console:
    """Return a console on stdout: as wide as the terminal, or without limit where the output goes to a program.

    ``COLUMNS`` sets the width of both.
    """
    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=_UNLIMITED if piped else None, highlight=False)


def table(title: str | None, *columns: str, rows: Iterable[tuple[str | Text, ...]], whole: tuple[str, ...] = ()) -> Table:
    """Build a table that folds long words instead of cutting them; columns in ``whole`` are not broken at all."""
    built = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        built.add_column(column, overflow="fold", no_wrap=column in whole)
    for row in rows:
        built.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return built


def words(given: list[str] | None) -> tuple[str, ...]:
    """Take apart an option that holds a list and may be repeated: words between commas and spaces, each once.

    >>> words(["a,b", "b c"])
    ('a', 'b', 'c')
    """
    return tuple(dict.fromkeys(word for part in given or () for word in part.replace(",", " ").split()))


def count(text: str) -> int:
    """Read an integer >= 1; typer's own words for it depend on its version and leave out what came."""
    if text.isdecimal() and int(text) >= 1:
        return int(text)
    msg = f"expected an integer >= 1, got {text!r}"
    raise typer.BadParameter(msg)


def command(screen: Console, text: str, indent: int = 4) -> None:
    """Print a command on a line of its own, never wrapped, so that it can be copied."""
    screen.print(Text(" " * indent) + Text(text, style="bold cyan"), soft_wrap=True)


def mark(screen: Console, status: str) -> Text:
    """Return ``[✓]``, ``[!]``, ``[✗]`` or ``[-]``, in ASCII where the output can hold nothing else."""
    marks = _MARKS if screen.encoding.lower().startswith("utf") else _ASCII_MARKS
    return Text.assemble("[", (marks[status], STATUS_STYLES[status]), "] ")


def print_json(value: object) -> None:
    """Print a report for programs."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def shortened(error: UnknownNameError) -> str:
    """Leave out the list of all names where it is long and something nearer is known to help.

    >>> from moe_routing_registry import UnknownNameError
    >>> shortened(UnknownNameError("router", "mixtrall", ["mixtral", *map(str, range(99))]))
    "unknown router 'mixtrall': did you mean 'mixtral'? `moe-routing list` shows all 100"
    """
    text = str(error)
    if error.kind != "router" or len(error.known) <= _FEW:
        return text
    return f"{text.partition('Known: ')[0].rstrip()} `moe-routing list` shows all {len(error.known)}"
