"""Python warnings that other libraries emit while we build a kernel are shown.

They never become an error of the kernel.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING

from moe_routing_registry.locks import ForkSafeLock

if TYPE_CHECKING:
    from collections.abc import Iterator


class _Count:
    """How many blocks are open in all threads, and what the first of them changed.

    :ivar undo: restores the filters; set by the first block that opens, called by the last one that
        closes.
    """

    def __init__(self) -> None:
        self.lock = ForkSafeLock()
        self.entered = 0
        self.undo = contextlib.ExitStack()


_count = _Count()


@contextlib.contextmanager
def not_raised() -> Iterator[None]:
    """Show warnings inside the block where the filters in force would raise them.

    Such filters are those of ``python -W error`` and of pytest.

    Filters belong to the process, so a block in one thread counts for warnings of all threads while
    it is open. They are changed by the first block that opens and restored by the last one that
    closes; no lock is held in between, for a block may compile for a minute and may open another
    one. What the filters ignore stays ignored.

    >>> with warnings.catch_warnings(record=True) as shown:
    ...     warnings.simplefilter("error")
    ...     with not_raised():
    ...         warnings.warn("a compiler's remark", stacklevel=1)
    >>> [str(warning.message) for warning in shown]
    ["a compiler's remark"]
    """
    with _count.lock:
        if _count.entered == 0 and any(f[0] == "error" for f in warnings.filters):
            _count.undo.enter_context(warnings.catch_warnings())
            warnings.filters = [
                ("default" if f[0] == "error" else f[0], *f[1:]) for f in warnings.filters
            ]
        _count.entered += 1
    try:
        yield
    finally:
        with _count.lock:
            _count.entered -= 1
            if _count.entered == 0:
                _count.undo.close()
