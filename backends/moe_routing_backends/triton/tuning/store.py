"""The user's own launch tables, which ``moe-routing tune`` writes.

One file a device, driver and Triton version.
"""

from __future__ import annotations

import errno
import os
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from moe_routing_backends.triton.planning.table import PlanTable
from moe_routing_backends.triton.tuning.table import (
    Table,
    beyond,
    parse,
    to_json,
    usable,
    warn_ignored,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from moe_routing_backends.triton.planning.launches import PlanStep
    from moe_routing_backends.triton.planning.table import PlanKey
    from moe_routing_backends.triton.tuning.table import Key, Step
    from moe_routing_registry import DeviceInfo


_TEMPORARY = ".tmp"
_LONGEST = 200
"""Characters of a table's name; file systems take 255 with the ending."""


def identity(device: DeviceInfo) -> dict[str, str]:
    """Return what a measured table is for.

    Another part, driver or compiler may want other launches.
    """
    triton = device.toolchain("triton")
    return {
        "name": device.name,
        "driver": device.driver,
        "triton": (triton.version if triton else None) or "",
    }


def user_path(device: DeviceInfo) -> Path:
    """Return where the user's own table of this device is kept."""
    import platformdirs

    known = identity(device)
    name = f"{known['name']}-{device.arch}-driver{known['driver']}-triton{known['triton']}"
    safe = "".join(c if c.isascii() and (c.isalnum() or c in "-._") else "_" for c in name)[
        :_LONGEST
    ]
    return Path(platformdirs.user_cache_dir("moe-routing")) / "triton" / f"{safe}.json"


@cache
def own_table(device: DeviceInfo) -> Table | None:
    """Return the user's own table.

    One that is corrupt, stale or of another device is named in a warning and ignored.
    """
    path = user_path(device)
    table = usable(path)
    if table is None:
        return None
    why = _unfit(table, device)
    if not why:
        return table
    warn_ignored(path, why)
    return None


def _unfit(table: Table, device: DeviceInfo) -> str:
    """Say why a table is not for the device, ``""`` where it is."""
    if table.device != identity(device):
        known = table.device or {}
        measured_on = (
            ", ".join(f"{key} {value}" for key, value in known.items() if value)
            or "an unknown device"
        )
        here = ", ".join(f"{key} {value}" for key, value in identity(device).items() if value)
        return f"it is of {measured_on}, this is {here}"
    launches = (step.launch for steps in table.rules.values() for step in steps)
    return next(
        (
            f"expected {limit}, got {launch}"
            for launch in launches
            if (limit := beyond(launch, device))
        ),
        "",
    )


def check_keeping(device: DeviceInfo) -> None:
    """Raise ``OSError`` if a table could not be kept.

    Asked before hours are spent on measuring one.
    """
    path = user_path(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        tempfile.TemporaryFile(dir=path.parent).close()
        if path.is_dir() and not path.is_symlink():  # which no file can replace
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))


def keep(device: DeviceInfo, rules: Mapping[Key, tuple[Step, ...]]) -> Path:
    """Add rules to the user's own table.

    Two processes that do so at once lose nothing, and readers see a whole file.

    What was there and cannot be used is replaced. Raises ``OSError`` for what cannot be written.
    """

    def added(kept: Table, now: str) -> Table:
        return replace(kept, provenance=now, rules={**kept.rules, **rules})

    return _rewrite(device, added)


def keep_plans(device: DeviceInfo, rules: Mapping[PlanKey, tuple[PlanStep, ...]]) -> Path:
    """Add rules of ``plan`` to the user's own table, likewise."""

    def added(kept: Table, now: str) -> Table:
        before = kept.plans.rules if kept.plans else {}
        return replace(kept, plans=PlanTable(kept.source, now, {**before, **rules}))

    return _rewrite(device, added)


def _rewrite(device: DeviceInfo, change: Callable[[Table, str], Table]) -> Path:
    """Replace the user's own table by what a function makes of it, given its provenance."""
    path = user_path(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        _clear_temporaries(path)
        own_table.cache_clear()
        known = identity(device)
        versions = ", ".join(f"{key} {known[key]}" for key in ("driver", "triton") if known[key])
        now = (
            f"tuned on this {known['name'] or device.arch} ({versions}), "
            f"{datetime.now(timezone.utc).date()}"
        )
        made = change(own_table(device) or Table(str(path), now, {}, known), now)
        text = to_json(device.arch, made.provenance, made.rules, known, made.plans)
        parse(text, str(path))
        write(path, text)
    own_table.cache_clear()
    return path


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all: readers and other writers never see a part of it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.", suffix=_TEMPORARY)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink()
        raise


def _clear_temporaries(path: Path) -> None:
    """Remove what writers left that were killed; the lock is held, so none is at work."""
    for left in path.parent.iterdir():
        if left.name.startswith(f"{path.name}.") and left.name.endswith(_TEMPORARY):
            left.unlink()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait for the lock of a table; it goes with the process that holds it, however that ends.

    The lock's file is never written, and never another one: a link in its place is an ``OSError``.
    """
    import fcntl  # where Triton is, Linux is

    # O_NONBLOCK: a pipe in its place must not wait for a reader.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    handle = os.open(path.with_suffix(".lock"), flags, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
