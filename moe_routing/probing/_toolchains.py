"""What can compile for a device: torch, triton, ROCm, XPU and IPEX, installed against usable, with the command that mends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from packaging.version import InvalidVersion, Version

from moe_routing.probing._installed import IPEX
from moe_routing_registry import Toolchain

if TYPE_CHECKING:
    from moe_routing.probing._installed import Installed
    from moe_routing.probing._observe import TorchBuild

TORCH_RANGE = ("2.8", "2.13")
TRITON_RANGE = ("3.6", "3.9")
"""Oldest version that works and newest that was tested, both inclusive."""

_TRITON_BACKEND = {"cuda": "nvidia", "rocm": "amd", "xpu": "intel"}
_REINSTALL_TORCH = "uv pip install --reinstall torch --torch-backend={}"
_TORCH_BACKEND = {"cuda": "auto", "rocm": "auto", "xpu": "xpu"}


def toolchains(platform: str, build: TorchBuild | None, installed: Installed) -> tuple[Toolchain, ...]:
    """Judge every toolchain for a device of that platform.

    :param platform: ``DeviceInfo.platform``; for ``"cpu"`` triton is judged usable when it carries any backend at all.
    :param build: what torch says of itself, or ``None`` where torch cannot be imported.
    :param installed: the packages beside it.
    """
    return (
        _torch(build),
        _triton(platform, installed),
        _runtime("rocm", build.hip if build else None, platform, build),
        _runtime("xpu", build.xpu if build else None, platform, build),
        _ipex(platform, build, installed),
    )


def _torch(build: TorchBuild | None) -> Toolchain:
    if build is None:
        fix = "pip install --force-reinstall 'torch>=2.8'"
        return Toolchain(name="torch", version=None, usable=False, detail="cannot be imported", fix=fix)
    made_for = {"cuda": f"CUDA {build.cuda}", "hip": f"ROCm (HIP {build.hip})", "xpu": f"XPU (SYCL {build.xpu})"}
    detail = f"built for {made_for.get(build.kind, 'the CPU')}"
    age = _age(build.version, TORCH_RANGE)
    fix = f"pip install --upgrade 'torch>={TORCH_RANGE[0]}'" if age == "old" else ""
    return Toolchain(
        name="torch",
        version=build.version,
        usable=age != "old",
        detail=detail + _remark(age, TORCH_RANGE),
        fix=fix,
    )


def _triton(platform: str, installed: Installed) -> Toolchain:
    fix = _triton_fix(platform)
    present = installed.tritons
    if not present and not installed.triton_backends:
        needed = "" if platform in ("cpu", "meta") else fix
        return Toolchain(name="triton", version=None, usable=False, detail="not installed", fix=needed)
    if len(present) > 1:
        names = " and ".join(f"{name} {version}" for name, version in present.items())
        detail = f"{names} are both installed and have overwritten each other"
        mend = f"pip uninstall --yes {' '.join(present)}; {fix}"
        return Toolchain(name="triton", version=" / ".join(present.values()), usable=False, detail=detail, fix=mend)
    name, version = next(iter(present.items()), ("triton", ""))
    carried = ", ".join(installed.triton_backends) or "no backend"
    detail = ("" if name == "triton" else f"{name}: ") + f"carries {carried}"
    wanted = _TRITON_BACKEND.get(platform)
    if platform in ("cpu", "meta"):
        fits = bool(installed.triton_backends)
    else:
        fits = wanted in installed.triton_backends
        if not fits:
            detail += f", not {wanted}" if wanted else f"; none is known for {platform}"
    age = _age(version, TRITON_RANGE)
    usable = fits and age != "old"
    return Toolchain(
        name="triton",
        version=version or None,
        usable=usable,
        detail=detail + _remark(age, TRITON_RANGE),
        fix="" if usable else fix,
    )


def _triton_fix(platform: str) -> str:
    """Name the command that brings the right triton: with torch's ROCm and XPU builds comes their own."""
    if platform in ("rocm", "xpu"):
        return _REINSTALL_TORCH.format(_TORCH_BACKEND[platform])
    return f"pip install --force-reinstall 'triton>={TRITON_RANGE[0]}'" if platform in ("cuda", "cpu", "meta") else ""


def _runtime(name: str, version: str | None, platform: str, build: TorchBuild | None) -> Toolchain:
    if version:
        return Toolchain(name=name, version=version, usable=True, detail="in torch")
    here = "torch cannot be imported" if build is None else f"torch is not built for it (torch {build.version})"
    fix = _REINSTALL_TORCH.format(_TORCH_BACKEND[name]) if platform == name else ""
    return Toolchain(name=name, version=None, usable=False, detail=here, fix=fix)


def _ipex(platform: str, build: TorchBuild | None, installed: Installed) -> Toolchain:
    version = installed.versions.get(IPEX)
    if version is None:
        detail = "not installed, and not needed: torch's own XPU build replaced it"
        return Toolchain(name="ipex", version=None, usable=False, detail=detail)
    remove = f"pip uninstall --yes {IPEX}"
    torch_version = build.version if build else "missing"
    if _series(version) != "2.8" or build is None or _series(torch_version) != "2.8":
        detail = (
            f"{version} beside torch {torch_version}: importing it raises. Its last release, 2.8, works only with torch 2.8; "
            "later versions of torch contain it"
        )
        return Toolchain(name="ipex", version=version, usable=False, detail=detail, fix=remove)
    if platform == "xpu" and "xpu" not in version.partition("+")[2]:
        detail = f"{version} is the build for the CPU only (the one on PyPI); torch's own XPU build does without it"
        return Toolchain(name="ipex", version=version, usable=False, detail=detail, fix=remove)
    return Toolchain(name="ipex", version=version, usable=True, detail="the retired pair with torch 2.8")


def _series(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _age(version: str, supported: tuple[str, str]) -> str:
    """Say whether a version is ``"old"``, ``"new"`` (untested), ``"good"``, or ``"unknown"``."""
    try:
        release = Version(version).release[:2]
    except InvalidVersion:
        return "unknown"
    if release < Version(supported[0]).release:
        return "old"
    return "new" if release > Version(supported[1]).release else "good"


def _remark(age: str, supported: tuple[str, str]) -> str:
    return {
        "old": f"; too old, {supported[0]} or later is needed",
        "new": f"; newer than {supported[1]}, the newest that was tested",
        "unknown": "; of unknown version",
        "good": "",
    }[age]
