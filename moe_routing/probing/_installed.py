"""Which packages are installed, read from metadata and file names: nothing here is imported to find out.

``triton`` initialises drivers, and a mismatched IPEX ends the process, so neither may be imported just to look.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

TRITONS = ("triton", "triton-rocm", "pytorch-triton-rocm", "triton-xpu", "pytorch-triton-xpu")
"""Distributions that all import as ``triton`` and overwrite each other."""
IPEX = "intel-extension-for-pytorch"


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """The packages beside torch.

    :ivar versions: distribution name to version, only those that are installed.
    :ivar triton_backends: what the ``triton`` on disk really carries, ``("amd", "nvidia")`` for example.
    """

    versions: Mapping[str, str] = field(default_factory=dict)
    triton_backends: tuple[str, ...] = ()

    @property
    def tritons(self) -> dict[str, str]:
        """The distributions that claim to be triton, with their versions."""
        return {name: self.versions[name] for name in TRITONS if name in self.versions}

    @classmethod
    def read(cls, path: Sequence[str] | None = None) -> Installed:
        """Look along ``path``, or ``sys.path`` where it is ``None``.

        >>> Installed.read([]) == Installed()
        True
        """
        found = {name: _version(name, path) for name in (*TRITONS, IPEX)}
        return cls(
            versions={name: version for name, version in found.items() if version is not None},
            triton_backends=_triton_backends(path),
        )


def _version(name: str, path: Sequence[str] | None) -> str | None:
    for distribution in importlib.metadata.distributions(name=name, path=list(sys.path if path is None else path)):
        if "Version" in distribution.metadata:  # a leftover folder of a removed package has no metadata
            return str(distribution.version)
    return None


def _triton_backends(path: Sequence[str] | None) -> tuple[str, ...]:
    spec = importlib.util.find_spec("triton") if path is None else PathFinder.find_spec("triton", path)
    folders = [Path(place) / "backends" for place in (spec.submodule_search_locations or () if spec else ())]
    drivers = {driver.parent.name for folder in folders for driver in folder.glob("*/driver.py")}
    return tuple(sorted(drivers))
