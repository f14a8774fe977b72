from __future__ import annotations

import json
import subprocess
import sys

import moe_routing

MOST_MODULES = 80
"""Upper limit of the modules that the first router loads in addition to torch. It loads 59; no time is measured."""


def python(script):
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def test_importing_loads_four_modules_and_the_first_router_only_light_ones():
    script = """
import json, sys
import torch
def loaded(step):
    before = set(sys.modules)
    step()
    return sorted(name for name in set(sys.modules) - before if name.partition(".")[0] not in sys.stdlib_module_names)
by_import = loaded(lambda: __import__("moe_routing"))
by_router = loaded(lambda: sys.modules["moe_routing"].get_router("gemma4"))
initialized = [device for device in ("cuda", "xpu") if getattr(torch, device).is_initialized()]
print(json.dumps({"import": by_import, "router": by_router, "initialized": initialized}))
"""
    found = python(script)
    # The operators, for programs that torch.export.load loads; what they do is imported when one is called.
    assert found["import"] == ["moe_routing", "moe_routing._kernel", "moe_routing._op", "moe_routing._with_torch"]
    assert "moe_routing._router" in found["router"]
    packages = {name.partition(".")[0] for name in found["router"]}
    assert packages <= {"moe_routing", "moe_routing_registry", "moe_routing_backends", "pluggy", "packaging"}
    assert len(found["router"]) <= MOST_MODULES
    assert found["initialized"] == []


def test_importing_the_package_alone_does_not_import_torch():
    script = """
import json, sys
import moe_routing, moe_routing.conformance, moe_routing_registry
print(json.dumps(sorted({"torch", "triton", "pytest"} & set(sys.modules))))
"""
    assert python(script) == []


def test_every_public_name_is_there():
    assert "get_router" in moe_routing.__all__
    for name in moe_routing.__all__:
        assert getattr(moe_routing, name) is not None
        assert name in dir(moe_routing)


def test_an_unknown_attribute_is_an_attribute_error():
    assert not hasattr(moe_routing, "get_ruoter")
