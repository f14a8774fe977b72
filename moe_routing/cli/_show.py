"""What every command needs to show something: a console, tables, commands to copy, errors."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from contextvars import ContextVar
from errno import EISDIR
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import typer
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from moe_routing_registry.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from rich.console import ConsoleOptions, RenderableType, RenderResult
    from rich.segment import Segment

    from moe_routing_registry import UnknownNameError

_STDOUT = 1
_answer: ContextVar[TextIO | None] = ContextVar("moe_routing_answer", default=None)
"""The stream of the answer while stdout is reserved for it."""
_answered: ContextVar[bool] = ContextVar("moe_routing_answered", default=False)
"""Whether JSON was printed."""
_WORD = 20
"""Characters of a word up to which a table is not drawn where it would break the word."""
_DIGITS = 18
"""Of a count: what 64 bits hold."""
_NARROWEST, _UNLIMITED = 20, 100_000
_FEW = 12
STATUS_STYLES = {"ok": "green", "warning": "yellow", "problem": "red", "skipped": "dim"}
_MARKS = {"ok": "✓", "warning": "!", "problem": "✗", "skipped": "-"}
_ASCII_MARKS = {"ok": "+", "warning": "!", "problem": "x", "skipped": "-"}
STATE_STYLES = {"selected": "green", "available": "cyan", "rejected": "yellow", "unknown": "dim"}


class UsageError(Exception):
    """The command line itself is wrong; shown as one line on stderr, exit code 2."""


class Unusable(Exception):  # noqa: N818 -- the tool works; what was asked for does not
    """What was asked for cannot be used here; shown as one line on stderr, exit code 1."""


class _Console(Console):
    """A console on which text is text.

    No markup in it is read, and nothing in it steers the terminal.
    """

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Render without the control characters of what plug-ins, files and devices say.

        All that they say reaches the terminal here.
        """
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))

    def on_broken_pipe(self) -> None:
        """Leave it to the caller, who ends the command."""
        raise BrokenPipeError


@contextmanager
def reserved_stdout() -> Iterator[None]:
    """Keep stdout for the answer.

    What plug-ins, torch and compilers print meanwhile goes to stderr.

    That includes what goes past ``sys.stdout`` to file descriptor 1, from C++ or from processes
    that are started. Who asks for input meanwhile reads the end of a file.
    """
    answer, kept, stdin = sys.stdout, None, sys.stdin
    answer.flush()
    with suppress(OSError, ValueError):  # a stream that is no file: a test's or a notebook's
        if answer.fileno() == _STDOUT:
            kept = os.dup(_STDOUT)
            answer = os.fdopen(kept, "w", encoding=answer.encoding, errors=answer.errors)
            _point_stdout_to(sys.stderr)
    token = _answer.set(answer)
    try:
        with redirect_stdout(sys.stderr):
            sys.stdin = StringIO()
            yield
    finally:
        sys.stdin = stdin
        _answer.reset(token)
        try:
            answer.flush()
        finally:
            if kept is not None:
                os.dup2(kept, _STDOUT)
                with suppress(OSError):  # which the flush has raised
                    answer.close()


def _point_stdout_to(stream: TextIO | None) -> None:
    with (
        Path(os.devnull).open("w", encoding="utf-8")
        if stream is None
        else nullcontext(stream) as target
    ):
        os.dup2(target.fileno(), _STDOUT)


def drop_stdout() -> None:
    """Drop what stdout still holds and cannot write.

    Otherwise Python would try to write it again at the end of the process.
    """
    with suppress(OSError, ValueError):
        if sys.stdout.fileno() == _STDOUT:
            _point_stdout_to(None)


def leave_stdout() -> None:
    """Point stdout to stderr for the rest of the process.

    What plug-ins print at its end is no part of the answer.
    """
    with suppress(OSError, ValueError):
        if sys.stdout.fileno() == _STDOUT:
            _point_stdout_to(sys.stderr)
        sys.stdout = sys.stderr


def stdout() -> TextIO:
    """Return the stream of the answer."""
    return _answer.get() or sys.stdout


def console() -> Console:
    """Return a console on stdout.

    As wide as the terminal, or without limit where the output goes to a program.

    ``COLUMNS`` sets the width of both, from 20 on.
    """
    columns = os.environ.get("COLUMNS", "")
    width = None if stdout().isatty() else _UNLIMITED
    if columns.isdecimal():
        width = min(max(int(columns[:_DIGITS]), _NARROWEST), _UNLIMITED)
    return _Console(file=stdout(), width=width, highlight=False, markup=False, emoji=False)


def progress() -> Progress:
    """Return a progress bar on stderr, shown where that is a terminal."""
    on = _Console(stderr=True, highlight=False, markup=False, emoji=False)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=on, transient=True, disable=not on.is_terminal)


class _Rows:
    """A table, or a list where the screen is too narrow for the table.

    In the list, each row stands under its first cell; each other cell has a line or more.
    """

    def __init__(
        self,
        title: str | None,
        columns: Sequence[str],
        rows: Iterable[Sequence[str | Text]],
        whole: Sequence[str],
    ) -> None:
        self._title, self._columns, self._whole = title, columns, whole
        self._rows = [
            [Text(cell) if isinstance(cell, str) else cell for cell in row] for row in rows
        ]

    def __rich_console__(self, screen: Console, options: ConsoleOptions) -> RenderResult:
        needed = [["x" * width for width in map(self._least, range(len(self._columns)))]]
        if (
            Measurement.get(
                screen, options.update(max_width=_UNLIMITED), self._table(needed, self._columns)
            ).minimum
            <= options.max_width
        ):
            yield self._table(self._rows, self._whole)
            return
        if self._title:
            yield Text(self._title, style="bold")
        for first, *others in self._rows:
            yield Text(f"{self._columns[0]}: ", style="dim") + Text(first.plain, style="bold")
            for column, cell in zip(self._columns[1:], others, strict=True):
                if cell.plain:
                    line = Text(f"{column}: ", style="dim") + Text(cell.plain, style=cell.style)
                    yield Padding(line, (0, 0, 0, 2), expand=False)

    def _table(self, rows: Iterable[Sequence[str | Text]], whole: Sequence[str]) -> Table:
        title = Text(self._title) if self._title else None
        built = Table(
            title=title,
            title_justify="left",
            title_style="bold",
            box=SIMPLE_HEAD,
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )
        for column in self._columns:
            built.add_column(Text(column), overflow="fold", no_wrap=column in whole)
        for row in rows:
            built.add_row(*row)
        return built

    def _least(self, at: int) -> int:
        """Return the width that a column needs.

        Its longest cell, or its longest word where it may be wrapped.
        """
        cells = [row[at].plain for row in self._rows]
        if self._columns[at] in self._whole:
            return max(map(cell_len, [self._columns[at], *cells]))
        return max(
            min(cell_len(word), _WORD)
            for text in [self._columns[at], *cells]
            for word in text.split() or [""]
        )


def table(
    title: str | None,
    *columns: str,
    rows: Iterable[Sequence[str | Text]],
    whole: Sequence[str] = (),
) -> RenderableType:
    """Build a table in which no word is lost.

    Columns in ``whole`` are not broken at all, in the others long words fold.
    """
    return _Rows(title, columns, rows, whole)


def check_writable(option: str, path: Path) -> None:
    """Refuse, before the work, a file that could not be written after it.

    :raises UsageError: names the option, the file and why.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(EISDIR, os.strerror(EISDIR))
        if path.exists():
            path.open("ab").close()
        else:
            tempfile.TemporaryFile(dir=path.absolute().parent).close()
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        msg = (
            f"{option}: expected a file that can be written, got {str(path)!r}: "
            f"{getattr(error, 'strerror', None) or error}"
        )
        raise UsageError(msg) from error


def words(given: list[str] | None) -> tuple[str, ...]:
    """Take apart an option that holds a list and may be repeated.

    Words between commas and spaces, each once.

    >>> words(["a,b", "b c"])
    ('a', 'b', 'c')
    """
    return tuple(
        dict.fromkeys(word for part in given or () for word in part.replace(",", " ").split())
    )


def count(text: str) -> int:
    """Read an integer >= 1.

    typer's own message depends on the version of typer and leaves out what came.
    """
    if text.isdecimal() and len(text) <= _DIGITS and int(text) >= 1:
        return int(text)
    expected = (
        "an integer >= 1" if len(text) <= _DIGITS else f"an integer of at most {_DIGITS} digits"
    )
    msg = f"expected {expected}, got {text!r:.60}"
    raise typer.BadParameter(msg)


def command(screen: Console, text: str, indent: int = 4) -> None:
    """Print a command on a line of its own, never wrapped, so that it can be copied."""
    screen.print(Text(" " * indent) + Text(text, style="bold cyan"), soft_wrap=True)


def mark(screen: Console, status: str) -> Text:
    """Return ``[✓]``, ``[!]``, ``[✗]`` or ``[-]``.

    The mark is in ASCII where the output can hold nothing else.
    """
    marks = _MARKS if screen.encoding.lower().startswith("utf") else _ASCII_MARKS
    return Text.assemble("[", (marks[status], STATUS_STYLES[status]), "] ")


def print_json(value: object) -> None:
    """Print a report for programs."""
    _answered.set(True)
    stdout().write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def print_json_of(error: str) -> None:
    """Print a failure for programs, unless they have an answer already."""
    if not _answered.get():
        print_json({"schema_version": 1, "error": error})


def shortened(error: UnknownNameError) -> str:
    """Leave out the list of all names where it is long and something nearer is known to help.

    >>> from moe_routing_registry import UnknownNameError
    >>> shortened(UnknownNameError("router", "mixtrall", ["mixtral", *map(str, range(99))]))
    "unknown router 'mixtrall': did you mean 'mixtral'? `moe-routing list` shows all 100"
    """
    text = str(error)
    if error.kind != "router" or len(error.known) <= _FEW:
        return text
    return (
        f"{text.partition('Known: ')[0].rstrip()} `moe-routing list` shows all {len(error.known)}"
    )
