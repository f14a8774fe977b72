"""What a plug-in raises costs only the plug-in."""

from __future__ import annotations

import textwrap
import traceback
from contextlib import contextmanager
from typing import TYPE_CHECKING

from moe_routing_registry.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator


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
        self.trace = "".join(traceback.format_exception(error))
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


def sentence(doing: str, error: BaseException) -> str:
    """Say in one line what was raised.

    Compilers raise pages, of which the traceback keeps every word.
    """
    try:
        said = str(error)
    except Exception:  # noqa: BLE001 -- an exception's own text may raise anything
        said = "(its message cannot be shown)"
    text = (
        f"{doing} raised {type(error).__name__}: {printable(said)}"
        if said
        else f"{doing} raised {type(error).__name__}"
    )
    return textwrap.shorten(text, width=300, placeholder=" ...")
