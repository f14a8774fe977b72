"""These tests run by `make xpu-check`, which names the folders of Intel's packages.

Elsewhere nothing here is collected.
"""

from __future__ import annotations

import os

if "XPU_SITE" not in os.environ:
    collect_ignore_glob = ["*.py"]
