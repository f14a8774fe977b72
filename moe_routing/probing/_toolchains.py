"""The toolchains of a device: torch, triton, ROCm, XPU and IPEX.

Each is installed or usable, and has the command that fixes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from packaging.version import InvalidVersion, Version

from moe_routing.probing._installed import IPEX
from moe_routing_registry import Toolchain

if TYPE_CHECKING:
    from moe_routing.probing._installed import Installed, Triton
    from moe_routing.probing._observe import TorchBuild

TORCH_RANGE = ("2.8", "2.13")
TRITON_RANGE = ("3.6", "3.9")
"""Oldest version that works and newest that was tested, both inclusive."""
TRITON_XPU_RANGE = ("3.3", "3.9")
"""Likewise of Triton-XPU, which is at 3.4 with torch 2.8.

3.3 is what the kernels were compiled by.
"""

_TRITON_BACKEND = {"cuda": "nvidia", "rocm": "amd", "xpu": "intel"}
_TORCH_FOR = {
    "rocm": "uv pip install --reinstall torch --torch-backend=auto",
    "xpu": "uv pip install --reinstall torch --torch-backend=xpu",
}
"""Commands that bring torch's build for a platform, and with it the triton of that build."""
_INSTALL_TRITON = f"pip install --force-reinstall 'triton>={TRITON_RANGE[0]}'"
_TRITON_FOR = _TORCH_FOR | dict.fromkeys(("cuda", "cpu", "meta"), _INSTALL_TRITON)


def toolchains(
    platform: str, build: TorchBuild | None, installed: Installed
) -> tuple[Toolchain, ...]:
    """Judge every toolchain for a device of that platform.

    :param platform: ``DeviceInfo.platform``; for ``"cpu"`` and ``"meta"`` triton is usable when it
        carries any backend.
    :param build: what torch says of itself, or ``None`` where torch cannot be imported.
    :param installed: the packages that metadata knows.
    """
    return (
        _torch(build, installed.torch),
        _triton(platform, installed.triton),
        _runtime("rocm", build.hip if build else None, platform, build),
        _runtime("xpu", build.xpu if build else None, platform, build),
        _ipex(platform, build, installed.ipex),
    )


def _torch(build: TorchBuild | None, version: str | None) -> Toolchain:
    if build is None:
        fix = f"pip install --force-reinstall 'torch>={TORCH_RANGE[0]}'"
        detail = "cannot be imported" if version else "not installed"
        return Toolchain(name="torch", version=version, usable=False, detail=detail, fix=fix)
    made_for = {
        "cuda": f"CUDA {build.cuda}",
        "hip": f"ROCm (HIP {build.hip})",
        "xpu": f"XPU (SYCL {build.xpu})",
    }
    too_old, remark = _age(build.version, TORCH_RANGE)
    return Toolchain(
        name="torch",
        version=build.version,
        usable=not too_old,
        detail=f"built for {made_for.get(build.kind, 'the CPU')}{remark}",
        fix=f"pip install --upgrade 'torch>={TORCH_RANGE[0]}'" if too_old else "",
    )


def _triton(platform: str, triton: Triton | None) -> Toolchain:
    needed = platform not in ("cpu", "meta")
    fix = _TRITON_FOR.get(platform, "")
    if triton is None:
        return Toolchain(
            name="triton",
            version=None,
            usable=False,
            detail="not installed",
            fix=fix if needed else "",
        )
    version = triton.version or None
    overwrote = ""
    if triton.overwritten:
        others = " and ".join(triton.overwritten)
        overwrote = f"{triton.distribution} {triton.version} has overwritten {others}"
        gone = " ".join([triton.distribution, *(other.split()[0] for other in triton.overwritten)])
        fix = f"pip uninstall --yes {gone}" + (f" && {fix}" if fix else "")
    if triton.broken_by:
        announced = ", ".join(triton.broken_by)
        detail = f"{overwrote}, which still announces {announced}: importing triton.backends raises"
        return Toolchain(name="triton", version=version, usable=False, detail=detail, fix=fix)
    wanted = _TRITON_BACKEND.get(platform)
    fits = wanted in triton.backends if needed else bool(triton.backends)
    too_old, remark = _age(triton.version, TRITON_XPU_RANGE if platform == "xpu" else TRITON_RANGE)
    return Toolchain(
        name="triton",
        version=version,
        usable=fits and not too_old,
        detail=_carries(triton, platform, wanted)
        + remark
        + (f"; {overwrote}" if overwrote else ""),
        fix="" if fits and not too_old else fix,
    )


def _carries(triton: Triton, platform: str, wanted: str | None) -> str:
    text = "" if triton.distribution == "triton" else f"{triton.distribution}: "
    text += f"carries {', '.join(triton.backends) or 'no backend'}"
    if platform in ("cpu", "meta") or wanted in triton.backends:
        return text
    return f"{text}, not {wanted}" if wanted else f"{text}; none is known for {platform}"


def _runtime(name: str, version: str | None, platform: str, build: TorchBuild | None) -> Toolchain:
    if version:
        return Toolchain(name=name, version=version, usable=True, detail="in torch")
    why = (
        "torch cannot be imported"
        if build is None
        else f"torch {build.version} is not built for it"
    )
    return Toolchain(
        name=name,
        version=None,
        usable=False,
        detail=why,
        fix=_TORCH_FOR[name] if platform == name else "",
    )


def _ipex(platform: str, build: TorchBuild | None, version: str | None) -> Toolchain:
    if version is None:
        detail = "not installed, and not needed: torch's own XPU build replaced it"
        return Toolchain(name="ipex", version=None, usable=False, detail=detail)
    torch_version = build.version if build else "that cannot be imported"
    local = version.partition("+")[2]
    if not (_is_2_8(version) and _is_2_8(torch_version)):
        detail = (
            f"{version} with torch {torch_version}: importing it raises. Its last release, 2.8, "
            "works with torch 2.8 only; later versions of torch contain what it brought"
        )
    elif platform == "xpu" and "xpu" not in local:
        detail = (
            f"{version} is the build for the CPU (PyPI has no other); "
            "torch's own XPU build does without it"
        )
    else:
        return Toolchain(
            name="ipex", version=version, usable=True, detail="the retired pair with torch 2.8"
        )
    return Toolchain(
        name="ipex", version=version, usable=False, detail=detail, fix=f"pip uninstall --yes {IPEX}"
    )


def _is_2_8(version: str) -> bool:
    return version.split(".")[:2] == ["2", "8"]


def _age(version: str, supported: tuple[str, str]) -> tuple[bool, str]:
    """Say whether a version is too old, and what is remarkable about it."""
    oldest, newest = (Version(end).release for end in supported)
    try:
        release = Version(version).release[:2]
    except InvalidVersion:
        return False, "; of unknown version"
    if release < oldest:
        return True, f"; too old, {supported[0]} or later is needed"
    return (
        False,
        f"; newer than {supported[1]}, the newest that was tested" if release > newest else "",
    )
