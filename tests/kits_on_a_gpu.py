"""Run kits on a CUDA device, each in as many processes as there are cores, and keep the results.

    python tests/kits_on_a_gpu.py OUT.json BACKEND:OPERATION[:SECONDS] ...

A kit that does not end in its seconds (200 unless told) is ended; the file names what failed and
what did not end. The exit code is 1 if anything failed. Needs pytest-xdist and hypothesis.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import triton

SECONDS = 200
SEED = 20261128
STARTED = re.compile(r"^((?:\S*/)?test_named_backend\S*::.+?) *$", re.MULTILINE)
ENDED = re.compile(r"^\[gw\d+\] \[ *\d+%\] (\w+) (\S+?::.+?) *$", re.MULTILINE)
MESSAGE = re.compile(r"^_+ .*?\[(.+)\] _+\n(?:.*\n){3}((?:(?!_+ |=).*\n)+)", re.MULTILINE)
SHOWN = 600
"""Characters of a message that are kept."""


def command(backend: str, operation: str) -> list[str]:
    """Return what runs the whole kit; a test at a time goes to a process that is free."""
    return [
        sys.executable, "-m", "pytest", "-p", "xdist.plugin", "-p", "_hypothesis_pytestplugin",
        "-p", "no:cacheprovider", "-p", "moe_routing.conformance.pytest_plugin", "-v",
        "--pyargs", "moe_routing.conformance", "--moe-backend", backend, "--moe-operation",
        operation, "--moe-device", "cuda:0", "--moe-seed", str(SEED), "-n", str(os.cpu_count()),
        "--dist", "load", "--maxschedchunk", "1",
    ]  # fmt: skip


def case_of(name: str) -> str:
    """Return the name of the case, without those of file and function."""
    return name.partition("[")[2].removesuffix("]") or name


def judged(printed: str) -> dict[str, Any]:
    """Return counts and names from what pytest printed."""
    ended = {name.rpartition("conformance/")[2]: how for how, name in ENDED.findall(printed)}
    started = {name.rpartition("conformance/")[2] for name in STARTED.findall(printed)}
    messages = {name: text.strip()[:SHOWN] for name, text in MESSAGE.findall(printed)}
    failed = sorted(case_of(name) for name, how in ended.items() if how == "FAILED")
    counts = Counter(ended.values())
    return {
        "cases": len(started | set(ended)),
        "passed": counts["PASSED"],
        "skipped": counts["SKIPPED"],
        "failed": [{"case": name, "said": messages.get(name, "")} for name in failed],
        "not_ended": sorted(case_of(name) for name in started - set(ended)),
    }


def run(backend: str, operation: str, seconds: float) -> dict[str, Any]:
    """Run a kit for that long at most."""
    begin = time.perf_counter()
    own = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
    asked = command(backend, operation)
    try:
        done = subprocess.run(
            asked, check=False, capture_output=True, text=True, env=own, timeout=seconds
        )
        printed = done.stdout
    except subprocess.TimeoutExpired as expired:
        printed = (expired.stdout or b"").decode(errors="replace")
    return {
        "backend": backend,
        "operation": operation,
        "command": " ".join(["python", *asked[1:]]),
        "seconds": round(time.perf_counter() - begin),
        **judged(printed),
    }


def main() -> None:
    """Run the kits that are named."""
    runs: list[dict[str, Any]] = []
    for asked in sys.argv[2:]:
        backend, operation, *seconds = asked.split(":")
        result = run(backend, operation, float(seconds[0]) if seconds else SECONDS)
        shown = {key: result[key] for key in ("cases", "passed", "skipped", "seconds")}
        print(asked, shown, result["failed"][:5], result["not_ended"][:5], flush=True)  # noqa: T201 -- a script
        runs.append(result)
        about = {
            "device": torch.cuda.get_device_name(), "torch": torch.__version__,
            "triton": triton.__version__,
            "date": dt.datetime.now(tz=dt.timezone.utc).date().isoformat(),
        }  # fmt: skip
        Path(sys.argv[1]).write_text(json.dumps({**about, "runs": runs}, indent=1) + "\n")
    sys.exit(any(result["failed"] for result in runs))


if __name__ == "__main__":
    main()
