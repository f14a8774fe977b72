"""Run ``moe-routing doctor`` where torch answers as it did on a machine with an Arc Pro B60.

All packages are the real ones.

A process of its own. Arguments: the recorded device's file, then doctor's own.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

from moe_routing.cli import main
from moe_routing.probing import _probe
from moe_routing.probing._installed import Installed
from moe_routing.probing._observe import Observation, TorchBuild


def see(record):
    """Have probing see the recorded device beside what is here."""
    observe, locate, present = _probe.observe, _probe.locate, _probe.present

    def observe_recorded(kind, index):
        if kind != "xpu":
            return observe(kind, index)
        properties, build = SimpleNamespace(**record["properties"]), TorchBuild(**record["torch"])
        return Observation(
            type="xpu", index=0, properties=properties, build=build, installed=Installed.read()
        )

    _probe.observe = observe_recorded
    _probe.locate = lambda device: ("xpu", 0) if str(device).startswith("xpu") else locate(device)
    _probe.present = lambda: [*present(), "xpu:0"]


if __name__ == "__main__":
    see(json.loads(Path(sys.argv[1]).read_text()))
    sys.argv[:2] = ["moe-routing", "doctor"]
    main()
