"""The plug-in for vLLM where vLLM is missing, unknown, or looks as it was recorded: real processes, and packages on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from moe_routing.doctor import examine
from moe_routing.integrations.vllm import register, report
from moe_routing.integrations.vllm._seams import SEAMS

BODIES = {
    "__init__": "self.__dict__.update(locals()); self.bias_vl = None",
    "_compute_routing": "raise NotImplementedError",
    "routing_function": "raise NotImplementedError",
    "_get_padding_mask": "return None",
    "is_fused_moe_enabled": "return False",
    "create_fused_moe_router": "from vllm.model_executor.layers.fused_moe.router import fused_topk_router as home; "
    "return home.FusedTopKRouter(top_k, global_num_experts, scoring_func, renormalize)",
}
FACTORY = "from vllm.model_executor.layers.fused_moe.router.router_factory import create_fused_moe_router\n"
START = """
import json, sys
from moe_routing.integrations.vllm import register, report
register()
register()
"""
SAY = """
print(json.dumps({"report": report().to_dict(), "imported": sorted({"vllm", "torch"} & set(sys.modules))}))
"""
ROUTE = """
import torch
from vllm.model_executor.layers.fused_moe import layer
router = layer.create_fused_moe_router(2, global_num_experts=4)
weights, ids = router._compute_routing(torch.zeros(1, 8), torch.tensor([[0.0, 3.0, 1.0, 3.0]]), torch.int64)
assert ids.tolist() == [[1, 3]] and ids.dtype == torch.int64 and weights.tolist() == [[0.5, 0.5]]
"""


def write_vllm(site, version="0.33.0", **changed):
    """Write a package with the recorded signatures, or with other parameters for a function named in ``changed``."""
    files = {}
    for seam in SEAMS:
        class_name, _, name = seam.name.rpartition(".")
        decorated = "    @classmethod\n" if seam.parameters == "(cls)" else ""
        function = f"def {name}{changed.get(name, seam.parameters)}: {BODIES[name]}\n"
        classes = files.setdefault(seam.file, {})
        classes[class_name] = classes.get(class_name, "") + (f"{decorated}    {function}" if class_name else function)
    for file, classes in files.items():
        body = "".join(f"class {name}:\n{text}" if name else text for name, text in classes.items())
        (site / "vllm" / file).parent.mkdir(parents=True, exist_ok=True)
        (site / "vllm" / file).write_text(body)
    (site / "vllm/_version.py").write_text(f"__version__ = version = {version!r}\n")
    (site / "vllm/__init__.py").write_text("")
    (site / "vllm/model_executor/layers/fused_moe/layer.py").write_text(FACTORY)
    return site


def python(script, *path, flags=(), **environment):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MOE_ROUTING_", "VLLM_"))}
    inherited |= {"PYTHONPATH": os.pathsep.join(map(str, path))} | environment
    return subprocess.run(
        [sys.executable, "-W", "always::UserWarning", *flags, "-c", script],
        env=inherited, capture_output=True, text=True, check=False,
    )  # fmt: skip


def result(script, *path, **environment):
    """Return what a script printed as JSON, and how many warnings it gave."""
    run = python(script, *path, **environment)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout), run.stderr.count("PluginWarning: ")


@pytest.fixture
def doctor(monkeypatch):
    """The doctor's findings by check, with a folder before everything else on sys.path; it imports nothing of vLLM."""

    def examined(site, **environment):
        with monkeypatch.context() as patch:
            patch.delenv("VLLM_PLUGINS", raising=False)
            for name, value in environment.items():
                patch.setenv(name, value)
            patch.syspath_prepend(str(site))
            checks = examine(device="cpu", checks=["vllm", "environment"])["checks"]
        assert "vllm" not in sys.modules
        return {check["name"]: check for check in checks}

    return examined


def test_vllm_finds_the_plug_in_by_its_entry_point():
    (point,) = entry_points(group="vllm.general_plugins", name="moe-routing")
    assert point.load() is register


@pytest.mark.parametrize("value", ["", "0"])
def test_it_is_off_by_default_and_imports_nothing(tmp_path, value):
    said, warnings = result(START + SAY, write_vllm(tmp_path), MOE_ROUTING_VLLM=value)
    assert said == {"report": {"active": False, "refusal": "", "sites": []}, "imported": []}
    assert warnings == 0


def test_an_unclear_value_is_an_error_that_names_the_variable(tmp_path, doctor):
    run = python(START, write_vllm(tmp_path), MOE_ROUTING_VLLM="maybe")
    assert run.returncode == 1
    assert "ValueError: MOE_ROUTING_VLLM: expected 1 or 0, got 'maybe'" in run.stderr
    assert doctor(write_vllm(tmp_path), MOE_ROUTING_VLLM="maybe")["environment"]["status"] == "problem"


@pytest.mark.slow
@pytest.mark.parametrize("version", ["0.32.0", pytest.param("0.33.1rc2.dev3+gabc", marks=pytest.mark.slow)])
def test_a_known_vllm_is_routed_by_us(tmp_path, version):
    said, warnings = result(START + ROUTE + SAY, write_vllm(tmp_path, version), MOE_ROUTING_VLLM="1")
    assert warnings == 0
    site = {
        "router": "FusedTopKRouter",
        "formula": "ids = topk(l); w = softmax(l[ids])",
        "reason": "",
        "layers": 1,
        "calls": 1,
    }
    assert said["report"] == {"active": True, "refusal": "", "sites": [site]}


def test_switching_it_on_imports_no_model_of_vllm(tmp_path):
    script = START + "print(json.dumps([name for name in sys.modules if name.startswith('vllm.model_executor.models')]))"
    assert result(script, write_vllm(tmp_path), MOE_ROUTING_VLLM="1") == ([], 0)


UNTOUCHED = """
from vllm.model_executor.layers.fused_moe import layer
assert not hasattr(layer.create_fused_moe_router, "__wrapped__")
"""
UNKNOWN = {
    "newer": ({"version": "0.34.0"}, "its version is 0.34.0, and only 0.32 and 0.33 were read"),
    "changed": ({"_compute_routing": "(self, logits)"}, "_compute_routing takes (self, logits), not (self, hidden_states"),
    "default": (
        {"create_fused_moe_router": SEAMS[0].parameters.replace("renormalize=True", "renormalize=False")},
        "create_fused_moe_router takes (top_k, global_num_experts, renormalize=False",
    ),
}


@pytest.mark.parametrize(("changes", "because"), UNKNOWN.values(), ids=UNKNOWN)
def test_of_an_unknown_vllm_nothing_is_replaced_and_one_warning_says_so(tmp_path, changes, because):
    said, warnings = result(START + UNTOUCHED + SAY, write_vllm(tmp_path, **changes), MOE_ROUTING_VLLM="1")
    assert warnings == 1
    assert not said["report"]["active"]
    assert because in said["report"]["refusal"]


def test_a_vllm_that_lost_a_function_or_a_file_is_unknown(tmp_path):
    home = write_vllm(tmp_path) / "vllm/model_executor"
    (home / "models/gemma4.py").unlink()
    (home / "layers/fused_moe/router/cpu_router.py").write_text("class CPURouter: pass\n")
    said, warnings = result(START + SAY, tmp_path, MOE_ROUTING_VLLM="1")
    assert warnings == 1
    assert "models/gemma4.py has no Gemma4Router.routing_function" in said["report"]["refusal"]
    assert "cpu_router.py has no CPURouter.__init__" in said["report"]["refusal"]


def test_where_there_is_no_vllm_one_warning_says_so(tmp_path):
    said, warnings = result(START + SAY, tmp_path, MOE_ROUTING_VLLM="1")
    assert (said["report"]["refusal"], warnings) == ("vLLM is not installed", 1)


def test_a_folder_that_happens_to_be_called_vllm_is_none(tmp_path, doctor):
    (tmp_path / "vllm").mkdir()
    assert doctor(tmp_path)["vllm"]["status"] == "skipped"


def test_doctor_says_what_the_plug_in_would_do(tmp_path, doctor):
    site = write_vllm(tmp_path, "0.32.0")
    off, on = doctor(site)["vllm"], doctor(site, MOE_ROUTING_VLLM="1")["vllm"]
    assert (off["status"], off["summary"]) == (
        "ok",
        "vLLM 0.32.0 is known and left alone; MOE_ROUTING_VLLM=1 has us route for it",
    )
    assert (on["status"], on["summary"]) == ("ok", "vLLM 0.32.0 routes through us where its routers are known")
    assert on["details"].count("\n") == len(SEAMS) - 1


def test_doctor_warns_where_the_plug_in_would_not_be_called(tmp_path, doctor):
    check = doctor(write_vllm(tmp_path), MOE_ROUTING_VLLM="1", VLLM_PLUGINS="other")["vllm"]
    assert (check["status"], check["fix"]) == ("warning", "export VLLM_PLUGINS=other,moe-routing")


def test_doctor_warns_of_an_unknown_vllm_only_where_it_is_asked_to_route_for_it(tmp_path, doctor):
    site = write_vllm(tmp_path, "0.34.0")
    asked = doctor(site, MOE_ROUTING_VLLM="1")["vllm"]
    assert (doctor(site)["vllm"]["status"], asked["status"]) == ("ok", "warning")
    assert (asked["fix"], "0.34.0" in asked["summary"]) == ("unset MOE_ROUTING_VLLM", True)


@pytest.mark.slow
def test_doctor_says_what_the_plug_in_did_in_this_process(tmp_path):
    script = (
        START + ROUTE + "from moe_routing.doctor import examine\n"
        "print(json.dumps(examine(device='cpu', checks=['vllm'])['checks'][0]))"
    )
    check, _ = result(script, write_vllm(tmp_path), MOE_ROUTING_VLLM="1")
    assert check["summary"].endswith("; in this process 1 routers were replaced, 0 left alone")
    assert check["details"] == "1 x FusedTopKRouter, 1 calls: ids = topk(l); w = softmax(l[ids])"


def test_this_process_is_untouched():
    assert report().to_dict() == {"active": False, "refusal": "", "sites": []}
