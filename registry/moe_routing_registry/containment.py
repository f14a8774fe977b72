"""What a plug-in raises costs only the plug-in."""

from __future__ import annotations

import textwrap
import traceback
from contextlib import contextmanager
from typing import TYPE_CHECKING

from moe_routing_registry.text import line, printable, said_by, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class PluginFailure(Exception):  # noqa: N818 -- a failure of other code, which this carries
    """Something that a plug-in raised.

    :ivar error: what was raised.
    :ivar sentence: what was done and what was raised, in one line.
    :ivar trace: the traceback.
    """

    def __init__(self, doing: str, error: BaseException) -> None:
        """Keep what was done, and what it raised."""
        self.error = error
        self.sentence = sentence(doing, error)
        self.trace = trace_of(error)
        super().__init__(self.sentence)


@contextmanager
def contained(doing: str, *passing: type[BaseException]) -> Iterator[None]:
    """Turn whatever the block raises into a ``PluginFailure``.

    That includes what is no ``Exception``: ``SystemExit``, ``pytest.skip``,
    ``asyncio.CancelledError``, the panic of an extension in Rust. Only ``KeyboardInterrupt``, which
    comes from the user, passes.

    :param doing: what the block does, for the sentence: ``"its import"``.
    :param passing: what passes too.

    >>> try:
    ...     with contained("its import"):
    ...         raise SystemExit(3)
    ... except PluginFailure as failure:
    ...     print(failure)
    its import raised SystemExit: 3
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, *passing)):
            raise
        raise PluginFailure(doing, error) from error


def notes_of(doing: str, read: Callable[[], object]) -> tuple[str, ...]:
    """Return the notes of a backend or a kernel, a line each; what is wrong with them is a note.

    >>> notes_of("its notes", lambda: None)
    ('its notes returned None, not a tuple of strings',)
    """
    try:
        with contained(doing):
            notes = read()
            if isinstance(notes, (tuple, list)) and all(isinstance(note, str) for note in notes):
                return tuple(line(note) for note in notes)
            return (f"{doing} returned {shown(notes)}, not a tuple of strings",)
    except PluginFailure as failure:
        return (failure.sentence,)


def trace_of(error: BaseException) -> str:
    """Return the traceback of what was raised."""
    return said_by(
        lambda: "".join(traceback.format_exception(error)), "(its traceback cannot be shown)"
    )


def sentence(doing: str, error: BaseException) -> str:
    """Say in one line what was raised.

    Compilers raise pages, of which the traceback keeps every word.
    """
    said = said_by(lambda: str(error), "(its message cannot be shown)")
    text = (
        f"{doing} raised {type(error).__name__}: {printable(said)}"
        if said
        else f"{doing} raised {type(error).__name__}"
    )
    return textwrap.shorten(text, width=300, placeholder=" ...")
