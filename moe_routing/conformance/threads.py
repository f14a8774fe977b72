"""Threads that call at once, and take turns as often as they can."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

THREADS = 8


def made_at_once(calls: Sequence[Callable[[], Any]], times: int) -> Iterator[tuple[str, list[Any]]]:
    """Make each call so many times in a thread of its own, all of them together.

    :returns: for each call what an error calls its thread, and what the thread made.
    """
    together = threading.Barrier(len(calls))

    def work(call: Callable[[], Any]) -> list[Any]:
        together.wait()
        return [call() for _ in range(times)]

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that what threads share shows
    try:
        with ThreadPoolExecutor(len(calls)) as pool:
            results = list(pool.map(work, calls))
    finally:
        sys.setswitchinterval(before)
    for thread, made in enumerate(results):
        yield f"thread {thread + 1} of {len(calls)}", made
