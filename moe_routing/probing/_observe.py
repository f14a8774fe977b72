"""Everything that asks torch about a device.

What it answers is an ``Observation``, which ``describe`` turns into words.

An ``Observation`` can also be written down: that is how devices that are not here are tested.
"""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_routing.probing._installed import Installed
from moe_routing_registry.text import refusal, shown

if TYPE_CHECKING:
    from types import ModuleType

_WITHOUT_INDEX = ("cpu", "mps", "meta")
_INDEXED = ("cuda", "xpu")
NUMPY_WARNING = "Failed to initialize NumPy"
"""How the warning begins that torch gives at its import in an environment without NumPy.

Nothing here needs NumPy.
"""


class UnknownDeviceError(ValueError):
    """The device cannot exist: torch has no such device type, or cannot read the text."""


class AbsentDeviceError(ValueError):
    """The device could exist, and is not on this machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchBuild:
    """What the installed torch says of itself.

    :ivar version: ``"2.13.0+cpu"`` for example.
    :ivar cuda: version of CUDA that it was built with, or ``None``.
    :ivar hip: version of HIP (ROCm) that it was built with, or ``None``.
    :ivar xpu: version of the SYCL runtime that it was built with, or ``None``.
    """

    version: str
    cuda: str | None = None
    hip: str | None = None
    xpu: str | None = None

    @property
    def kind(self) -> str:
        """What it was built for: ``"cuda"``, ``"hip"``, ``"xpu"`` or ``"cpu"``."""
        return next((kind for kind in ("hip", "cuda", "xpu") if getattr(self, kind)), "cpu")

    @classmethod
    def read(cls) -> TorchBuild:
        """Import torch and ask it."""
        import torch

        answers = {kind: getattr(torch.version, kind, None) for kind in ("cuda", "hip", "xpu")}
        return cls(version=str(torch.__version__), **answers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What torch and the machine answered about one device.

    :ivar type: torch's device type.
    :ivar index: index of the device, or ``None`` where the type has only one.
    :ivar properties: torch's properties object, ``HostProperties``, ``MpsProperties``, or ``None``
        where nobody answers.
    :ivar driver: version of the driver, as its files say, ``""`` where no file does.
    :ivar build: what the installed torch says of itself.
    :ivar installed: the packages next to it.
    """

    type: str
    index: int | None = None
    properties: object = None
    driver: str = ""
    build: TorchBuild
    installed: Installed


@dataclass(frozen=True, slots=True, kw_only=True)
class HostProperties:
    """What the operating system says of the CPU."""

    name: str
    machine: str
    threads: int
    total_memory: int

    @classmethod
    def read(cls) -> HostProperties:
        """Ask the operating system."""
        threads = (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 0
        )
        return cls(
            name=_cpu_name(),
            machine=platform.machine(),
            threads=threads,
            total_memory=_host_memory(),
        )


def _cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor()


def _host_memory() -> int:
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names or "SC_PAGE_SIZE" not in names:
        return 0
    return max(0, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


@dataclass(frozen=True, slots=True, kw_only=True)
class MpsProperties:
    """What torch says of Apple's GPU, which has no properties object of its own."""

    name: str
    core_count: int
    recommended_max_memory: int

    @classmethod
    def read(cls) -> MpsProperties:
        """Ask torch; a torch without these questions leaves the answer empty."""
        import torch

        ask_name = getattr(torch.backends.mps, "get_name", str)
        ask_cores = getattr(torch.backends.mps, "get_core_count", int)
        return cls(
            name=ask_name(),
            core_count=ask_cores(),
            recommended_max_memory=torch.mps.recommended_max_memory(),
        )


def locate(device: object) -> tuple[str, int | None]:
    """Check the argument and make it definite: the type, and the index where the type has several.

    :raises TypeError: for another type of argument.
    :raises UnknownDeviceError: for a device that torch does not know.
    :raises AbsentDeviceError: for one that is not here.
    """
    import torch

    if not isinstance(device, (torch.device, str)):
        raise TypeError(refusal("device", "a torch.device or a str such as 'cuda:0'", device))
    try:
        parsed = torch.device(device)
    except RuntimeError as error:
        known = ", ".join(repr(name) for name in present())
        msg = f"device: expected a device that torch knows, got {shown(device)}; here are {known}"
        raise UnknownDeviceError(msg) from error
    if parsed.type in _WITHOUT_INDEX:
        index = None
    else:
        module = _module(parsed.type)
        index = parsed.index if parsed.index is not None else _current(module)
    _require_present(parsed.type, index)
    return parsed.type, index


def _module(kind: str) -> ModuleType | None:
    """Return ``torch.cuda``, ``torch.xpu``, ... or ``None`` for a backend that registered none."""
    import torch

    try:
        module: ModuleType = torch.get_device_module(kind)
    except RuntimeError:  # torch's answer for a type without a module
        return None
    return module


def _current(module: ModuleType | None) -> int:
    ask = getattr(module, "current_device", None)
    return int(ask()) if ask is not None and _count(module) else 0


def _count(module: ModuleType | None) -> int | None:
    """Count the devices of a type, or return ``None`` where its module cannot say."""
    ask = getattr(module, "device_count", None)
    return None if ask is None else int(ask())


def _require_present(kind: str, index: int | None) -> None:
    if kind in ("cpu", "meta"):
        return
    count = _count(_module(kind))
    if count is None or (index or 0) < count:
        return
    wanted = kind if index is None else f"{kind}:{index}"
    msg = (
        f"device: {wanted!r} is not on this machine; "
        f"torch {TorchBuild.read().version} sees {', '.join(present())}"
    )
    raise AbsentDeviceError(msg)


def observe(kind: str, index: int | None) -> Observation:
    """Ask torch about one device, without making it the current one."""
    build = TorchBuild.read()
    return Observation(
        type=kind,
        index=index,
        properties=_properties(kind, index),
        driver=driver_version(build) if kind == "cuda" else "",
        build=build,
        installed=Installed.read(),
    )


def _properties(kind: str, index: int | None) -> object:
    if kind == "cpu":
        return HostProperties.read()
    if kind == "mps":
        return MpsProperties.read()
    ask: Any = getattr(_module(kind), "get_device_properties", None)
    return None if kind == "meta" or ask is None else ask(index)


def driver_version(build: TorchBuild, root: Path = Path("/")) -> str:
    """Read the version of NVIDIA's or AMD's running driver from the driver's own file.

    Without such a file, return ``""``.
    """
    file = root / ("sys/module/amdgpu/version" if build.hip else "proc/driver/nvidia/version")
    if (
        not file.is_file()
    ):  # Windows, WSL, and AMD's driver as it comes with Linux, which has no version of its own
        return ""
    text = file.read_text(encoding="utf-8", errors="replace")
    if build.hip:
        return text.strip()
    found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", text)
    return found[1] if found else ""


def present() -> list[str]:
    """Name the devices that torch sees, the CPU first."""
    import torch

    from moe_routing.private_api import privateuse1_name

    accelerator = torch.accelerator.current_accelerator()
    foreign = privateuse1_name()
    kinds = dict.fromkeys([*_INDEXED, "mps", foreign, *([accelerator.type] if accelerator else [])])
    names = ["cpu"]
    for kind in kinds:
        count = _count(_module(kind)) or 0
        names += (
            [kind][:count]
            if kind in _WITHOUT_INDEX
            else [f"{kind}:{index}" for index in range(count)]
        )
    return names
