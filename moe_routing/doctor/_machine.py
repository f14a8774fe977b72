"""``Machine``: what is here, found out before anything is judged, whatever raises on the way."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import signal
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moe_routing.probing import (
    NUMPY_WARNING,
    Installed,
    TorchBuild,
    UnknownDeviceError,
    intel_arch,
    toolchains,
)
from moe_routing_registry.containment import PluginFailure, contained, trace_of
from moe_routing_registry.text import said_by

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moe_routing_registry import DeviceInfo, Toolchain

_PATIENCE = 120


@dataclass(frozen=True, slots=True)
class Failure:
    """Something that raised: what, and where."""

    sentence: str
    traceback: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Keep what an exception says."""
        said = said_by(lambda: str(error), "(its message cannot be shown)")
        first = said.strip().partition("\n")[0]
        return cls(f"{type(error).__name__}: {first}", trace_of(error))


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What is here.

    :ivar build: what torch says of itself, or ``None`` where it cannot be imported.
    :ivar torch_failure: why it cannot.
    :ivar installed: triton and IPEX, from metadata.
    :ivar devices: the devices that could be probed, the CPU first.
    :ivar device_failures: the others, by name.
    :ivar remarks: what torch warned of on the way, a driver that is too old for example.
    """

    build: TorchBuild | None
    torch_failure: Failure | None
    installed: Installed
    devices: tuple[DeviceInfo, ...]
    device_failures: dict[str, Failure]
    remarks: tuple[str, ...]

    @property
    def main_device(self) -> DeviceInfo | None:
        """The first accelerator, else the CPU; ``None`` without torch."""
        return next(
            (device for device in self.devices if device.is_accelerator),
            next(iter(self.devices), None),
        )

    @property
    def toolchains(self) -> tuple[Toolchain, ...]:
        """What serves the main device; judged for the CPU where there is none."""
        main = self.main_device
        return main.toolchains if main else toolchains("cpu", self.build, self.installed)


def look(only: str | None = None) -> Machine:
    """Look at everything that is here, or at one device only."""
    with quietly() as said:
        installed = Installed.read()
        build, torch_failure = _import_torch()
        found: list[DeviceInfo] = []
        failures: dict[str, Failure] = {}
        if build is not None:
            try:
                with contained("probing", UnknownDeviceError):
                    _probe_into(found, failures, only)
            except PluginFailure as failure:  # a torch that imports, and is broken all the same
                build, torch_failure = None, Failure.of(failure.error)
    return Machine(
        build=build,
        torch_failure=torch_failure,
        installed=installed,
        devices=tuple(found),
        device_failures=failures,
        remarks=tuple(said),
    )


@contextlib.contextmanager
def quietly() -> Iterator[list[str]]:
    """Collect warnings, each once, and send what others print to stderr.

    Stdout belongs to the report.
    """
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", message=NUMPY_WARNING)
        yield said
        said += dict.fromkeys(str(warning.message).strip().partition("\n")[0] for warning in caught)


def _import_torch() -> tuple[TorchBuild | None, Failure | None]:
    """Import torch, in a process of its own first.

    A torch for another CPU, say, kills the process that imports it.
    """
    if "torch" not in sys.modules and importlib.util.find_spec("torch") is not None:
        failure = _import_elsewhere("torch")
        if failure is not None:
            return None, failure
    try:
        with contained("importing torch"):
            return TorchBuild.read(), None
    except PluginFailure as failure:
        return None, Failure.of(failure.error)


def _import_elsewhere(module: str) -> Failure | None:
    """Import a module in a process that looks where this one looks.

    Report what it raised, a signal, or a hang.
    """
    command = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; import {module}"]
    try:
        run = subprocess.run(  # noqa: S603 -- this Python
            command, capture_output=True, text=True, check=False, timeout=_PATIENCE
        )
    except subprocess.TimeoutExpired:
        return Failure(f"importing it does not end within {_PATIENCE} seconds", "")
    if run.returncode == 0:
        return None
    if run.returncode < 0:
        return Failure(
            f"importing it kills the process with {signal.Signals(-run.returncode).name}",
            run.stderr,
        )
    return Failure(_raised(run.stderr) or f"importing it exits with {run.returncode}", run.stderr)


def _raised(printed: str) -> str:
    r"""Return the first line of what was raised.

    The one at the margin after the last frame of a traceback.

    >>> frames = "Traceback (most recent call last):\n  File 'x.py'\n    f()\n"
    >>> _raised(frames + "OSError: no\nsuch luck")
    'OSError: no'
    """
    _, _, last = printed.rpartition("\n  File ")
    frame, *after = last.splitlines() or [""]
    at_margin = (line for line in after if line and not line[0].isspace())
    return next(at_margin, frame if not after else "")


def _probe_into(found: list[DeviceInfo], failures: dict[str, Failure], only: str | None) -> None:
    from moe_routing.probing import device_names, probe

    for name in [only] if only else device_names():
        try:
            with contained("probing", UnknownDeviceError):
                found.append(probe(name))
        except PluginFailure as failure:  # noqa: PERF203 -- each device may fail for itself
            failures[name] = Failure.of(failure.error)


def backend_autoloaders() -> list[str]:
    """Name the distributions that ask torch to import them whenever torch is imported.

    Their entry points are in the group ``torch.backends``.
    """
    try:
        with contained("reading metadata"):
            points = importlib.metadata.entry_points(group="torch.backends")
    except PluginFailure:  # the check "plugins" names the distribution that cannot be read
        return []
    return sorted({point.dist.name for point in points if point.dist})


def gpus_without_torch(root: Path = Path("/")) -> list[tuple[str, str]]:
    """Name the GPUs that the operating system shows: vendor, and the file that says so.

    Asks no driver.
    """
    seen = [
        (vendor, f"/{file}")
        for vendor, file in (("NVIDIA", "proc/driver/nvidia/version"), ("AMD", "dev/kfd"))
        if (root / file).exists()
    ]
    for file in sorted(root.glob("sys/class/drm/card*/device/device")):
        vendor = file.with_name("vendor")
        if (
            vendor.is_file()
            and vendor.read_text().strip() == "0x8086"
            and intel_arch(None, int(file.read_text(), 16))
        ):
            seen.append(("Intel", f"/{file.relative_to(root)}"))
    return seen
