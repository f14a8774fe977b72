"""``describe``: from what torch answered to a ``DeviceInfo``.

Pure: asks nobody, so that recorded answers can be fed in.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from moe_routing.probing._intel import intel_arch
from moe_routing.probing._toolchains import toolchains
from moe_routing_registry import DeviceInfo

if TYPE_CHECKING:
    from collections.abc import Callable

    from moe_routing.probing._observe import Observation

_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}


def describe(seen: Observation) -> DeviceInfo:
    """Turn what torch answered about a device into words, every toolchain included."""
    platform = "rocm" if seen.type == "cuda" and seen.build.hip else seen.type
    read: Callable[[Any], dict[str, Any]] = _FACTS.get(platform, _unknown_facts)
    facts = read(seen.properties)
    return DeviceInfo(
        type=seen.type,
        index=seen.index,
        platform=platform,
        driver=str(getattr(seen.properties, "driver_version", ""))
        or seen.driver,  # torch tells that of Intel's only
        toolchains=toolchains(platform, seen.build, seen.installed),
        **facts,
    )


def _cpu_facts(host: Any) -> dict[str, Any]:  # noqa: ANN401 -- torch's properties objects share no base class, here and below
    machine = host.machine.lower()
    return {
        "arch": _MACHINES.get(machine, machine),
        "name": host.name,
        "total_memory": host.total_memory,
        "compute_units": host.threads,
    }


def _cuda_facts(p: Any) -> dict[str, Any]:  # noqa: ANN401
    return _gpu_facts(p, f"sm_{p.major}{p.minor}")


def _rocm_facts(p: Any) -> dict[str, Any]:  # noqa: ANN401
    return _gpu_facts(p, p.gcnArchName.split(":")[0])


def _gpu_facts(p: Any, arch: str) -> dict[str, Any]:  # noqa: ANN401
    return {
        "arch": arch,
        "name": p.name,
        "total_memory": p.total_memory,
        "compute_units": p.multi_processor_count,
        "warp_sizes": (p.warp_size,),
    }


def _xpu_facts(p: Any) -> dict[str, Any]:  # noqa: ANN401
    return {
        "arch": intel_arch(getattr(p, "architecture", None), getattr(p, "device_id", None)),
        "name": p.name,
        "total_memory": p.total_memory,
        "compute_units": p.gpu_subslice_count,
        "warp_sizes": tuple(sorted(p.sub_group_sizes)),
    }


def _mps_facts(p: Any) -> dict[str, Any]:  # noqa: ANN401
    generation = re.match(r"Apple (M\d+)", p.name)
    return {
        "arch": generation[1].lower() if generation else "",
        "name": p.name,
        "total_memory": p.recommended_max_memory,
        "compute_units": p.core_count,
        "warp_sizes": (32,),  # Apple's SIMD group, on every generation that torch supports
    }


def _unknown_facts(p: object) -> dict[str, Any]:
    """Take what a foreign properties object has under the usual names.

    Nothing is also an answer.
    """
    warp = getattr(p, "warp_size", None)
    return {
        "name": str(getattr(p, "name", "")),
        "total_memory": int(getattr(p, "total_memory", 0)),
        "compute_units": int(getattr(p, "multi_processor_count", 0)),
        "warp_sizes": () if warp is None else (int(warp),),
    }


_FACTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "cpu": _cpu_facts,
    "cuda": _cuda_facts,
    "rocm": _rocm_facts,
    "xpu": _xpu_facts,
    "mps": _mps_facts,
}
