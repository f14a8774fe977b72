from __future__ import annotations

import json
import statistics
import subprocess
import sys

import moe_routing


def python(script):
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def test_importing_costs_at_most_torch_plus_50_ms_and_touches_no_device():
    script = """
import json, sys, time
import torch
start = time.perf_counter()
import moe_routing
seconds = time.perf_counter() - start
moe_routing.get_router("gemma4")
bad = [name for name in ("triton", "transformers", "rich", "typer", "intel_extension_for_pytorch") if name in sys.modules]
print(json.dumps({"seconds": seconds, "bad": bad, "cuda": torch.cuda.is_initialized(), "xpu": torch.xpu.is_initialized()}))
"""
    runs = [python(script) for _ in range(3)]
    assert all(run["bad"] == [] and not run["cuda"] and not run["xpu"] for run in runs)
    assert statistics.median(run["seconds"] for run in runs) < 0.05


def test_importing_the_package_alone_does_not_import_torch():
    script = """
import json, sys
import moe_routing, moe_routing.testing, moe_routing_registry
print(json.dumps(sorted({"torch", "triton", "pytest"} & set(sys.modules))))
"""
    assert python(script) == []


def test_every_public_name_is_there():
    for name in moe_routing.__all__:
        assert getattr(moe_routing, name) is not None
        assert name in dir(moe_routing)


def test_an_unknown_attribute_is_an_attribute_error():
    assert not hasattr(moe_routing, "get_ruoter")
