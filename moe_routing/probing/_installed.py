"""Which packages are installed, read from metadata and file names.

Nothing here is imported to find out.

``triton`` initialises drivers, and a mismatched IPEX raises anything at import, so neither may be
imported just to look.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING

from moe_routing_registry.containment import PluginFailure, contained

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from importlib.machinery import ModuleSpec
    from importlib.metadata import Distribution

TRITONS = ("triton", "triton-rocm", "pytorch-triton-rocm", "triton-xpu", "pytorch-triton-xpu")
"""Distributions that all import as ``triton`` and overwrite each other."""
IPEX = "intel-extension-for-pytorch"
TRITON_BACKENDS_GROUP = "triton.backends"
_LIBRARY = "triton/_C/libtriton.so"


@dataclass(frozen=True, slots=True, kw_only=True)
class Triton:
    """The triton that an import would find.

    :ivar distribution: whose files they are, ``"triton"`` where no metadata says.
    :ivar version: its version, ``""`` where no metadata says.
    :ivar backends: what it really carries, ``("amd", "nvidia")`` for example.
    :ivar overwritten: distributions, with versions, whose files were overwritten by this one.
    :ivar broken_by: backends that an overwritten distribution still announces; ``import
        triton.backends`` raises on them.
    """

    distribution: str = "triton"
    version: str = ""
    backends: tuple[str, ...] = ()
    overwritten: tuple[str, ...] = ()
    broken_by: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """The packages that metadata knows; ``None`` for what is not installed.

    :ivar torch: version of torch by its metadata, which says nothing about whether it can be
        imported.
    :ivar triton: the triton that an import would find.
    :ivar ipex: version of Intel's extension for PyTorch.
    """

    torch: str | None = None
    triton: Triton | None = None
    ipex: str | None = None

    @classmethod
    def read(cls, path: Sequence[str] | None = None) -> Installed:
        """Look along ``path``, or ``sys.path`` where it is ``None``.

        >>> Installed.read([])
        Installed(torch=None, triton=None, ipex=None)
        """
        torch, ipex = _distribution("torch", path), _distribution(IPEX, path)
        return cls(
            torch=torch.version if torch else None,
            triton=_triton(path),
            ipex=ipex.version if ipex else None,
        )


def _distribution(name: str, path: Sequence[str] | None) -> Distribution | None:
    found = importlib.metadata.distributions(
        name=name, path=list(sys.path if path is None else path)
    )
    # A leftover folder of a removed package has no version.
    return next(
        (distribution for distribution in found if "Version" in distribution.metadata), None
    )


def _triton(path: Sequence[str] | None) -> Triton | None:
    """Find the triton on disk.

    Where several distributions claim it, return the one whose compiled library is there.
    """
    spec = _importable("triton") if path is None else PathFinder.find_spec("triton", path)
    places = [Path(place) for place in (spec.submodule_search_locations or () if spec else ())]
    if not places:
        return None
    claims = [found for found in (_distribution(name, path) for name in TRITONS) if found]
    owner = next((claim for claim in claims if len(claims) == 1 or _wrote(claim, places)), None)
    # Since 3.6 triton asks the entry points, so a folder that another distribution left behind does
    # not count.
    announced = set(_announced([owner])) if owner else set()
    folders = {
        driver.parent.name for place in places for driver in place.glob("backends/*/driver.py")
    }
    carried = folders & announced if announced else folders
    others = [claim for claim in claims if claim is not owner]
    return Triton(
        distribution=_name(owner) if owner else "triton",
        version=owner.version if owner else "",
        backends=tuple(sorted(carried)),
        overwritten=tuple(f"{_name(claim)} {claim.version}" for claim in others),
        broken_by=tuple(sorted(set(_announced(others)) - carried)),
    )


def _importable(name: str) -> ModuleSpec | None:
    """Find what an import would find.

    A stub in ``sys.modules`` has no files, and a finder that somebody installed may raise anything.
    """
    try:
        with contained(f"looking for {name}"):
            return importlib.util.find_spec(name)
    except PluginFailure:
        return None


def _name(distribution: Distribution) -> str:
    return distribution.metadata["Name"].lower().replace("_", "-")


def _announced(distributions: Iterable[Distribution]) -> list[str]:
    return [
        point.name
        for d in distributions
        for point in d.entry_points
        if point.group == TRITON_BACKENDS_GROUP
    ]


def _wrote(distribution: Distribution, places: Iterable[Path]) -> bool:
    """Say whether the compiled library on disk has the size that the distribution recorded."""
    libraries = [place.parent / _LIBRARY for place in places]
    sizes = {library.stat().st_size for library in libraries if library.is_file()}
    return any(str(file) == _LIBRARY and file.size in sizes for file in distribution.files or ())
