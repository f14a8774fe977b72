"""Scripts that tests run in processes of their own: whether Triton interprets is chosen once."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def printed(script: Path, *arguments: str, interprets: bool = True, **environment: str) -> str:
    """Return what a script prints.

    :param interprets: whether Triton interprets its kernels; otherwise it compiles them.
    :param environment: further variables of the process.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    chosen = {"TRITON_INTERPRET": "1"} if interprets else {}
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        check=False, capture_output=True, text=True, env=inherited | chosen | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
