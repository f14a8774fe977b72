"""``ForkSafeLock``: a reentrant lock that is free in a forked child.

``fork`` copies a lock that another thread holds, but not the thread that would release it: whoever
takes it in the child waits for ever. Every lock of this project is of this type. What a lock guards
is written in one step, so the child finds either all of it or nothing.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

_LOCKS: weakref.WeakSet[ForkSafeLock] = weakref.WeakSet()


class ForkSafeLock:
    """A ``threading.RLock`` for ``with`` statements, released in a forked child.

    A lock that the forking thread itself holds stays held.

    >>> lock = ForkSafeLock()
    >>> with lock, lock:
    ...     pass
    """

    __slots__ = ("__weakref__", "_lock")

    def __init__(self) -> None:
        """Make a lock that nobody holds."""
        self._lock = threading.RLock()
        _LOCKS.add(self)

    def __enter__(self) -> None:
        """Wait until no other thread holds the lock, and hold it."""
        self._lock.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release the lock."""
        self._lock.release()

    def renew(self) -> None:
        """Release what another thread held when this process was forked."""
        # In the child the forking thread is the only one. A lock that it holds is released by its
        # own `with` statement.
        if self._lock.acquire(blocking=False):
            self._lock.release()
        else:
            self._lock = threading.RLock()


def _renew_all() -> None:
    for lock in tuple(_LOCKS):
        lock.renew()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_renew_all)
