"""The user's own launch tables, which ``moe-routing tune`` writes: one file a device, driver and Triton version."""

from __future__ import annotations

import os
import tempfile
import warnings
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from moe_routing_backends.triton.table import parse, to_json, usable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from moe_routing_backends.triton.table import Key, Step, Table
    from moe_routing_registry import DeviceInfo


def identity(device: DeviceInfo) -> dict[str, str]:
    """Return what a measured table is for: another part, driver or compiler may want other launches."""
    triton = device.toolchain("triton")
    return {"name": device.name, "driver": device.driver, "triton": (triton.version if triton else None) or ""}


def user_path(device: DeviceInfo) -> Path:
    """Return where the user's own table of this device is kept."""
    import platformdirs

    known = identity(device)
    name = f"{known['name']}-{device.arch}-driver{known['driver']}-triton{known['triton']}"
    safe = "".join(c if c.isalnum() or c in "-._" else "_" for c in name)
    return Path(platformdirs.user_cache_dir("moe-routing")) / "triton" / f"{safe}.json"


@cache
def own_table(device: DeviceInfo) -> Table | None:
    """Return the user's own table; one that is corrupt, stale or of another device is named in a warning and ignored."""
    path = user_path(device)
    table = usable(path)
    if table is None or table.device == identity(device):
        return table
    measured_on = ", ".join(f"{key} {value}" for key, value in (table.device or {}).items() if value) or "an unknown device"
    here = ", ".join(f"{key} {value}" for key, value in identity(device).items() if value)
    text = f"moe-routing ignores the launch table {path}: it is of {measured_on}, this is {here}"
    warnings.warn(text, RuntimeWarning, stacklevel=2)
    return None


def keep(device: DeviceInfo, rules: Mapping[Key, tuple[Step, ...]]) -> Path:
    """Add rules to the user's own table; two processes that do so at once lose nothing, and readers see a whole file.

    What was there and cannot be used is replaced.
    """
    path = user_path(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock")):
        own_table.cache_clear()
        kept = own_table(device)
        known = identity(device)
        versions = ", ".join(f"{key} {known[key]}" for key in ("driver", "triton") if known[key])
        provenance = f"tuned on this {known['name'] or device.arch} ({versions}), {datetime.now(timezone.utc).date()}"
        text = to_json(device.arch, provenance, {**(kept.rules if kept else {}), **rules}, known)
        parse(text, str(path))
        write(path, text)
    own_table.cache_clear()
    return path


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all: readers and other writers never see a part of it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink()
        raise


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait for the lock; it goes with the process that holds it, however that ends."""
    import fcntl  # where Triton is, Linux is

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
