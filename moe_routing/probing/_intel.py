"""Names of Intel's GPU generations, in the spelling of Intel's offline compiler.

``bmg-g21``, ``pvc``.
"""

from __future__ import annotations

_GENERATIONS = {
    (12, 55): "acm-g10",
    (12, 56): "acm-g11",
    (12, 57): "acm-g12",
    (12, 60): "pvc",
    (12, 61): "pvc-vg",
    (12, 70): "mtl-u",
    (12, 71): "mtl-h",
    (12, 74): "arl-h",
    (20, 1): "bmg-g21",
    (20, 2): "bmg-g31",
    (20, 4): "lnl-m",
    (30, 0): "ptl-h",
    (30, 1): "ptl-u",
}
"""Generation of the graphics IP, (architecture, release), to name."""

_DEVICE_IDS = {
    "acm-g10": (0x56A0, 0x56A1, 0x56A2, 0x56C0),
    "acm-g11": (0x56A5, 0x56A6, 0x56C1),
    "bmg-g21": (0xE20B, 0xE20C, 0xE211, 0xE212),
    "bmg-g31": (0xE223,),
    "lnl-m": (0x6420, 0x64A0),
    "pvc": (0x0BD5, 0x0BD6, 0x0BD7, 0x0BD8, 0x0BD9, 0x0BDA, 0x0BDB),
}
"""PCI ids of the parts, for a torch whose SYCL compiler was too old to name the architecture."""


def intel_arch(architecture: int | None, device_id: int | None) -> str:
    """Name an Intel GPU's generation, ``""`` where it is not known.

    SYCL's architecture number is the 32-bit GMD id shifted left by 8; the id packs architecture (10
    bits), release (8 bits) and, in its lowest 6 bits, a stepping that does not matter here.

    :param architecture: SYCL's architecture number, as ``torch.xpu.get_device_properties`` gives
        it, or ``None``.
    :param device_id: the PCI id of the part, or ``None``.

    >>> intel_arch(0x500400400, None)
    'bmg-g21'
    >>> intel_arch(None, 0x0BDA)
    'pvc'
    >>> intel_arch(0x7FFFFFFFF, 0x1234)
    ''
    """
    if architecture:
        generation = (architecture >> 30 & 0x3FF, architecture >> 22 & 0xFF)
        if generation in _GENERATIONS:
            return _GENERATIONS[generation]
    return next((arch for arch, ids in _DEVICE_IDS.items() if device_id in ids), "")
