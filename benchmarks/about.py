"""What every kept CPU result says of the machine that it was measured on."""

from __future__ import annotations

import json
import platform
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import torch

import moe_routing

if TYPE_CHECKING:
    from pathlib import Path


def write(path: Path, what: str, **measured: object) -> None:
    """Write the measured values as JSON behind machine, versions and date."""
    about = {
        "what": what,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {moe_routing.probe('cpu').name}",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    path.write_text(json.dumps({**about, **measured}, indent=1) + "\n")
