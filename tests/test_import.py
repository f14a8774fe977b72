from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import moe_routing
import moe_routing_registry

ROOT = Path(__file__).parents[1]

MOST_MODULES = 83
"""Modules that the first router loads in addition to torch: what it loads, and no more.

No time is measured.
"""


def python(script):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout)


def test_importing_loads_ten_modules_and_the_first_router_only_light_ones():
    script = """
import json, sys
import torch
def loaded(step):
    before = set(sys.modules)
    step()
    new = set(sys.modules) - before
    return sorted(name for name in new if name.partition(".")[0] not in sys.stdlib_module_names)
by_import = loaded(lambda: __import__("moe_routing"))
by_router = loaded(lambda: sys.modules["moe_routing"].get_router("gemma4"))
initialized = [device for device in ("cuda", "xpu") if getattr(torch, device).is_initialized()]
print(json.dumps({"import": by_import, "router": by_router, "initialized": initialized}))
"""
    found = python(script)
    # The operators, for programs that torch.export.load loads; what they do is imported when one is
    # called.
    assert found["import"] == [
        "moe_routing",
        "moe_routing._op",
        "moe_routing._with_torch",
        "moe_routing.gating",
        "moe_routing.gating.kernel",
        "moe_routing.gating.op",
        "moe_routing.kernel",
        "moe_routing.permutation",
        "moe_routing.permutation.kernel",
        "moe_routing.permutation.op",
        "moe_routing.planning",
        "moe_routing.planning.kernel",
        "moe_routing.planning.op",
    ]
    assert "moe_routing._router" in found["router"]
    packages = {name.partition(".")[0] for name in found["router"]}
    assert packages <= {
        "moe_routing",
        "moe_routing_registry",
        "moe_routing_backends",
        "pluggy",
        "packaging",
    }
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


def imports(path):
    """Yield the dotted names of what a file imports.

    They are modules, and names that are imported from modules.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_no_package_imports_a_private_module_of_another():
    wrong = []
    for root in (ROOT, ROOT / "registry", ROOT / "backends"):
        for path in root.glob("moe_routing*/**/*.py"):
            package = ".".join(path.parent.relative_to(root).parts)
            for name in imports(path):
                owner, private, _ = name.partition("._")
                if (
                    private
                    and name.startswith("moe_routing")
                    and not f"{package}.".startswith(f"{owner}.")
                ):
                    wrong.append(f"{path}: {name}")
    assert not wrong


def test_the_registry_exports_what_plug_ins_need_and_no_more():
    assert len(moe_routing_registry.__all__) <= 20
