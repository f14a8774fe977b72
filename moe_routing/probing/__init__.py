"""What devices are here, and what compiles for them: found out once for each device, on first use.

Nothing happens at import: torch is imported and a device is initialised when the first question about it is asked.
"""

from moe_routing.probing._probe import device_names, devices, probe

__all__ = ["device_names", "devices", "probe"]
