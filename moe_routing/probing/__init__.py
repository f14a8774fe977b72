"""What devices are here, and what compiles for them: found out once for each device, on first use.

Nothing happens at import: torch is imported and a device is initialised when the first question
about it is asked.
"""

from moe_routing.probing._installed import Installed
from moe_routing.probing._intel import intel_arch
from moe_routing.probing._observe import (
    NUMPY_WARNING,
    AbsentDeviceError,
    TorchBuild,
    UnknownDeviceError,
    locate,
)
from moe_routing.probing._probe import device_names, devices, probe
from moe_routing.probing._toolchains import toolchains

__all__ = [
    "NUMPY_WARNING",
    "AbsentDeviceError",
    "Installed",
    "TorchBuild",
    "UnknownDeviceError",
    "device_names",
    "devices",
    "intel_arch",
    "locate",
    "probe",
    "toolchains",
]
