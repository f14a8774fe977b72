"""These tests run in the environment of `make vllm-check`.

Where vLLM is missing nothing of this folder is collected.
"""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["*.py"]
