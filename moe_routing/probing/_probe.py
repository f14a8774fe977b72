"""``probe``: the given device, never the current one, asked once and remembered."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_routing.probing._describe import describe
from moe_routing.probing._observe import locate, observe, present
from moe_routing_registry.locks import ForkSafeLock

if TYPE_CHECKING:
    import torch

    from moe_routing_registry import DeviceInfo

_known: dict[tuple[str, int | None], DeviceInfo] = {}
_lock = ForkSafeLock()


def probe(device: torch.device | str) -> DeviceInfo:
    """Find out what a device is and which toolchains serve it.

    The answer is about ``device`` itself, whichever device is current. ``"cuda"`` without an index
    is the device that is current at that moment. Asked once for each device and remembered; safe
    from many threads.

    :param device: a ``torch.device``, or what ``torch.device`` takes: ``"cpu"``, ``"cuda:1"``,
        ``"xpu"``, ``"meta"``, the name of a renamed privateuse1 backend.
    :raises TypeError: for anything that is neither a ``torch.device`` nor a ``str``.
    :raises ValueError: for a device that torch does not know, or that is not on this machine.

    >>> probe("cpu").platform
    'cpu'
    >>> probe("meta") is probe("meta")
    True
    """
    key = locate(device)
    found = _known.get(key)
    if found is None:
        with _lock:
            found = _known.get(key)
            if found is None:
                found = _known[key] = describe(observe(*key))
    return found


def device_names() -> list[str]:
    """Name the devices that torch sees here, the CPU first: ``["cpu", "cuda:0", "cuda:1"]``."""
    return present()


def devices() -> list[DeviceInfo]:
    """Probe every device that torch sees here, the CPU first.

    >>> devices()[0].type
    'cpu'
    """
    return [probe(name) for name in present()]
