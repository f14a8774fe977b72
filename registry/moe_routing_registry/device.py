"""``DeviceInfo``: what probing found out about one device, frozen."""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass
from typing import Any

INTERPRETER = "TRITON_INTERPRET"
"""The variable by which Triton interprets kernels, with NumPy on the CPU, and compiles none.

It reads it at its import.
"""


def triton_interprets() -> bool:
    """Tell whether Triton interprets kernels; the variable is read as Triton reads it."""
    return os.environ.get(INTERPRETER, "").lower() in ("1", "true", "on", "yes", "y")


@dataclass(frozen=True, slots=True, kw_only=True)
class Toolchain:
    """A compiler or runtime other than torch, as found on this machine.

    :ivar name: ``"torch"``, ``"triton"``, ``"rocm"``, ``"xpu"`` or ``"ipex"``.
    :ivar version: its version, or ``None`` where it is not installed.
    :ivar usable: whether it can be used, which is more than being installed.
    :ivar detail: what it carries, or why it cannot be used.
    :ivar fix: the command that fixes it, or ``""``.
    """

    name: str
    version: str | None
    usable: bool
    detail: str = ""
    fix: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceInfo:
    """One device, as ``moe_routing.probe`` found it.

    :ivar type: torch's device type (``"cuda"`` also on ROCm).
    :ivar index: index of the device, or ``None`` where the type has only one.
    :ivar platform: ``"cuda"``, ``"rocm"``, ``"xpu"``, ``"mps"``, ``"cpu"``, ``"meta"``, or the name
        of a privateuse1 backend.
    :ivar arch: ``"sm_90"``, ``"gfx942"``, ``"bmg-g21"``, ``"x86_64"``, or ``""`` where nothing is
        known.
    :ivar name: the vendor's name of the part.
    :ivar total_memory: bytes, 0 where nothing is known.
    :ivar compute_units: multiprocessors, compute units, Xe cores or CPU threads; 0 where nothing is
        known.
    :ivar warp_sizes: warp, wavefront or sub-group sizes in lanes, smallest first.
    :ivar driver: version of the driver, ``"580.159.04"``, or ``""`` where nothing is known.
    :ivar toolchains: what was found other than torch.
    """

    type: str
    platform: str
    index: int | None = None
    arch: str = ""
    name: str = ""
    total_memory: int = 0
    compute_units: int = 0
    warp_sizes: tuple[int, ...] = ()
    driver: str = ""
    toolchains: tuple[Toolchain, ...] = ()

    @property
    def capability(self) -> tuple[int, int] | None:
        """CUDA's compute capability, ``(9, 0)`` for ``sm_90``; ``None`` on every other platform.

        >>> DeviceInfo(type="cuda", platform="cuda", arch="sm_120").capability
        (12, 0)
        """
        found = re.fullmatch(r"sm_(\d+)(\d)[a-z]?", self.arch) if self.platform == "cuda" else None
        return (int(found[1]), int(found[2])) if found else None

    @property
    def is_accelerator(self) -> bool:
        """Whether this is something other than the CPU and torch's meta device."""
        return self.platform not in ("cpu", "meta")

    def toolchain(self, name: str) -> Toolchain | None:
        """Return the toolchain of that name, or ``None``."""
        return next((t for t in self.toolchains if t.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """Name the device as a user would: ``cuda:0 (NVIDIA H200, sm_90)``."""
        where = self.type if self.index is None else f"{self.type}:{self.index}"
        what = ", ".join(part for part in (self.name, self.arch) if part)
        return f"{where} ({what})" if what else where
