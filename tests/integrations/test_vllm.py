"""The plug-in for vLLM where vLLM is missing, unknown, or looks as it was recorded.

The processes and the packages on disk are real.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import entry_points
from pathlib import Path
from types import FunctionType

import pytest
import torch

from moe_routing.doctor import examine
from moe_routing.integrations.vllm import _bodies, register, report
from moe_routing.integrations.vllm.patch_points import PATCH_POINTS

FACTORY = PATCH_POINTS[0].parameters
FILES = {
    "__init__.py": "",
    "_version.py": "__version__ = version = '0.33.0'\n",
    "_aiter_ops.py": """
class rocm_aiter_ops:
    @classmethod
    def is_fused_moe_enabled(cls):
        return False
""",
    "model_executor/layers/fused_moe/layer.py": """
from vllm.model_executor.layers.fused_moe.router.router_factory import create_fused_moe_router
""",
    "model_executor/layers/fused_moe/router/router_factory.py": f"""
from vllm.model_executor.layers.fused_moe.router.fused_topk_router import FusedTopKRouter

def create_fused_moe_router{FACTORY}:
    return FusedTopKRouter(top_k, global_num_experts, scoring_func, renormalize)
""",
    "model_executor/layers/fused_moe/router/base_router.py": """
class BaseRouter:
    bias_vl = None

    def _compute_routing(self, hidden_states, router_logits, indices_type, *, input_ids=None):
        raise NotImplementedError

    def _select_experts(
        self, hidden_states, router_logits, topk_indices_dtype=None, *, input_ids=None
    ):
        return self._compute_routing(hidden_states, router_logits, topk_indices_dtype,
                                     input_ids=input_ids)
""",
    "model_executor/layers/fused_moe/router/fused_topk_router.py": """
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

def _get_padding_mask(num_tokens):
    return None

def fused_topk(logits, top_k):
    weights, ids = logits.topk(top_k)
    return weights.softmax(-1), ids

class FusedTopKRouter(BaseRouter):
    def __init__(
        self, top_k, global_num_experts, scoring_func="softmax", renormalize=True, eplb_state=None
    ):
        self.top_k, self.scoring_func, self.renormalize = top_k, scoring_func, renormalize

    def _compute_routing(self, hidden_states, router_logits, indices_type, *, input_ids=None):
        return fused_topk(router_logits, self.top_k)
""",
}
"""A package that looks like vLLM to the plug-in, with one kind of router.

``tests/vllm`` has the real one.
"""
ROUTER = "model_executor/layers/fused_moe/router/fused_topk_router.py"
BASE = "model_executor/layers/fused_moe/router/base_router.py"
NAME = "fused_topk_router.FusedTopKRouter"
START = """
import json, os, sys
from moe_routing.integrations.vllm import _bodies, register, report
_bodies.known = lambda: _bodies.Known(("0.32", "0.33"), json.loads(os.environ["BODIES"]))
register()
register()
"""
SAY = """
imported = sorted({"vllm", "torch"} & set(sys.modules))
print(json.dumps({"report": report().to_dict(), "imported": imported}))
"""
ROUTE = """
import torch
from vllm.model_executor.layers.fused_moe import layer
router = layer.create_fused_moe_router(2, global_num_experts=4)
logits = torch.tensor([[0.0, 3.0, 1.0, 3.0]])
weights, ids = router._compute_routing(torch.zeros(1, 8), logits, torch.int64)
assert ids.tolist() == [[1, 3]] and ids.dtype == torch.int64 and weights.tolist() == [[0.5, 0.5]]
"""


def write_vllm(site, version="0.33.0", **changed):
    """Write that package into ``site``, and return ``site``.

    :param changed: other text for a file, by the file's name without its suffix.
    """
    for file, text in FILES.items():
        (site / "vllm" / file).parent.mkdir(parents=True, exist_ok=True)
        (site / "vllm" / file).write_text(changed.get(Path(file).stem, text))
    (site / "vllm/_version.py").write_text(f"__version__ = version = {version!r}\n")
    return site


@functools.cache
def bodies():
    """The fingerprints of that package, as if it were a release that was read."""
    with tempfile.TemporaryDirectory() as site:
        root = write_vllm(Path(site)) / "vllm"
        return {
            name: {_bodies.body(root, name).fingerprint: "0.33"} for name in _bodies.known().bodies
        }


def python(script, *path, flags=(), **environment):
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MOE_ROUTING_", "VLLM_"))
    }
    inherited |= {
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "BODIES": json.dumps(bodies()),
    } | environment
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
    """The doctor's findings by check, with a folder before everything else on sys.path.

    The doctor imports nothing of vLLM.
    """

    def examined(site, **environment):
        with monkeypatch.context() as patch:
            patch.delenv("VLLM_PLUGINS", raising=False)
            for name, value in environment.items():
                patch.setenv(name, value)
            patch.syspath_prepend(str(site))
            patch.setattr(_bodies, "known", lambda: _bodies.Known(("0.32", "0.33"), bodies()))
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
    assert (
        doctor(write_vllm(tmp_path), MOE_ROUTING_VLLM="maybe")["environment"]["status"] == "problem"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "version", ["0.32.0", pytest.param("0.33.1rc2.dev3+gabc", marks=pytest.mark.slow)]
)
def test_a_known_vllm_is_routed_by_us(tmp_path, version):
    said, warnings = result(
        START + ROUTE + SAY, write_vllm(tmp_path, version), MOE_ROUTING_VLLM="1"
    )
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
    models = "[name for name in sys.modules if name.startswith('vllm.model_executor.models')]"
    script = START + f"print(json.dumps({models}))"
    assert result(script, write_vllm(tmp_path), MOE_ROUTING_VLLM="1") == ([], 0)


UNTOUCHED = """
from vllm.model_executor.layers.fused_moe import layer
assert not hasattr(layer.create_fused_moe_router, "__wrapped__")
"""
WITHOUT_RENORMALIZE = FACTORY.replace("renormalize=True", "renormalize=False")
UNKNOWN = {
    "newer": ({"version": "0.34.0"}, "its version is 0.34.0, and only 0.32 and 0.33 were read"),
    "changed": (
        {"base_router": "class BaseRouter:\n    def _compute_routing(self, logits): ..."},
        "_compute_routing takes (self, logits), not (self, hidden_states",
    ),
    "default": (
        {"router_factory": f"def create_fused_moe_router{WITHOUT_RENORMALIZE}: ..."},
        "create_fused_moe_router takes (top_k, global_num_experts, renormalize=False",
    ),
}


@pytest.mark.parametrize(("changes", "because"), UNKNOWN.values(), ids=UNKNOWN)
def test_of_an_unknown_vllm_nothing_is_replaced_and_one_warning_says_so(tmp_path, changes, because):
    said, warnings = result(
        START + UNTOUCHED + SAY, write_vllm(tmp_path, **changes), MOE_ROUTING_VLLM="1"
    )
    assert warnings == 1
    assert not said["report"]["active"]
    assert because in said["report"]["refusal"]


def test_a_vllm_that_lost_a_function_or_a_file_is_unknown(tmp_path):
    home = write_vllm(tmp_path, base_router="class BaseRouter: ...") / "vllm"
    (home / "_aiter_ops.py").unlink()
    said, warnings = result(START + SAY, tmp_path, MOE_ROUTING_VLLM="1")
    assert warnings == 1
    assert "_aiter_ops.py has no rocm_aiter_ops.is_fused_moe_enabled" in said["report"]["refusal"]
    assert "base_router.py has no BaseRouter._compute_routing" in said["report"]["refusal"]


CHANGED = {
    "method": (
        "return fused_topk(router_logits, self.top_k)",
        "return fused_topk(-router_logits, self.top_k)",
    ),
    "helper": ("logits.topk(top_k)", "logits.topk(top_k, largest=False)"),
    "constructor": ("self.top_k, self.scoring_func", "self.scoring_func, self.top_k"),
    "parameters": ('scoring_func="softmax"', 'scoring_func="sigmoid"'),
    "caller": (
        "return self._compute_routing(hidden_states, router_logits",
        "return self._compute_routing(None, router_logits",
    ),
}


@pytest.mark.parametrize(("old", "new"), CHANGED.values(), ids=CHANGED)
def test_code_that_was_not_read_has_another_fingerprint(tmp_path, old, new):
    changed = {Path(file).stem: text.replace(old, new) for file, text in FILES.items()}
    root = write_vllm(tmp_path, **changed) / "vllm"
    assert _bodies.body(root, NAME).fingerprint not in bodies()[NAME]


def test_comments_layout_annotations_and_other_functions_change_no_fingerprint(tmp_path):
    text = FILES[ROUTER].replace(
        "def fused_topk(logits, top_k):",
        "def fused_topk(logits: object,\n        top_k: int):  # two",
    )
    root = (
        write_vllm(
            tmp_path, fused_topk_router=f"import torch\n{text}\ndef other():\n    return 1\n"
        )
        / "vllm"
    )
    assert text != FILES[ROUTER]
    assert _bodies.body(root, NAME).fingerprint in bodies()[NAME]


def of_helper(site, text):
    """Write a router that calls ``most`` of another module, with that text in the other module.

    Return what is read of it.
    """
    helper = f"from vllm.{_bodies.ROUTERS.replace('/', '.')}.base_router import most as best\n"
    changed = helper + FILES[ROUTER].replace("logits.topk(top_k)", "best(logits, top_k)")
    return _bodies.body(
        write_vllm(site, fused_topk_router=changed, base_router=FILES[BASE] + text) / "vllm", NAME
    )


BLOCKS = {
    "module": "{}",
    "if": "if x:\n {}",
    "elif": "if x: pass\nelif y:\n {}",
    "else": "if x: pass\nelse:\n {}",
    "try": "try:\n {}\nexcept ImportError: pass",
    "except": "try: import x\nexcept OSError: pass\nexcept ImportError:\n {}",
    "try else": "try: import x\nexcept ImportError: pass\nelse:\n {}",
    "finally": "try: import x\nfinally:\n {}",
    "with": "with x:\n {}",
    "for": "for x in y:\n {}",
    "match": "match x:\n case 1:\n  {}",
    "both": "if x:\n try: import x\n except ImportError:\n  {}",
}


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_functions_from_other_router_modules_are_followed_into_every_block(tmp_path, block):
    text = block.format("def most(a, k): return a.topk(k)")
    first = of_helper(tmp_path / "first", text)
    assert ("vllm.model_executor.layers.fused_moe.router.base_router", "most") in first.functions
    assert of_helper(tmp_path / "again", text).fingerprint == first.fingerprint
    assert (
        of_helper(tmp_path / "other", text.replace("(k)", "(k, largest=False)")).fingerprint
        != first.fingerprint
    )


@pytest.mark.parametrize("outside", ["def f():\n {}", "async def f():\n {}", "class F:\n {}"])
def test_a_function_inside_another_or_a_method_is_no_function_of_the_module(tmp_path, outside):
    read = of_helper(tmp_path, outside.format("def most(a, k): return a.topk(k)"))
    assert "most" not in dict(read.functions).values()


ROUTE_THEIRS = """
import torch
from vllm.model_executor.layers.fused_moe import layer
router = layer.create_fused_moe_router(2, global_num_experts=4)
assert "_compute_routing" not in vars(router)
"""


@pytest.mark.slow
def test_a_router_whose_code_was_not_read_keeps_it_and_the_report_and_doctor_name_it(
    tmp_path, doctor
):
    changed = FILES[ROUTER].replace("logits.topk(top_k)", "(2 * logits).topk(top_k)")
    site = write_vllm(tmp_path, fused_topk_router=changed)
    said, warnings = result(START + ROUTE_THEIRS + SAY, site, MOE_ROUTING_VLLM="1")
    assert (said["report"]["active"], warnings) == (True, 0)
    (left,) = said["report"]["sites"]
    assert (left["router"], left["formula"], left["layers"]) == ("FusedTopKRouter", "", 1)
    assert left["reason"].startswith("its code is none that was read (fingerprint ")
    check = doctor(site, MOE_ROUTING_VLLM="1")["vllm"]
    assert check["status"] == "warning"
    assert "the code of 1 classes was not read" in check["summary"]
    assert check["details"].startswith(f"{NAME}: its code is none that was read")


@pytest.mark.slow
def test_a_router_of_which_another_plug_in_replaced_a_function_keeps_its_code(tmp_path):
    replace = """
from vllm.model_executor.layers.fused_moe.router import fused_topk_router
def fused_topk(logits, top_k): return logits.topk(top_k)
fused_topk_router.fused_topk = fused_topk
"""
    said, _ = result(
        START + replace + ROUTE_THEIRS + SAY, write_vllm(tmp_path), MOE_ROUTING_VLLM="1"
    )
    (left,) = said["report"]["sites"]
    assert left["reason"].endswith(
        "fused_topk_router.fused_topk was replaced, by __main__.fused_topk"
    )


def by_torch(function):
    return torch.compile(torch.no_grad()(function), backend="eager")


def by_triton(function):
    import triton

    return triton.jit(function)


@pytest.mark.parametrize("make", [lambda f: f, by_torch, functools.cache, by_triton])
def test_what_torch_triton_and_functools_make_of_a_function_is_still_from_its_module(make):
    def function(x):
        return x

    foreign = functools.wraps(function)(FunctionType(function.__code__, {"__name__": "elsewhere"}))
    assert _bodies.is_from(__name__, make(function))
    assert not _bodies.is_from(__name__, make(foreign))
    assert not _bodies.is_from(__name__, functools.partial(make(function)))


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
    assert (on["status"], on["summary"]) == (
        "ok",
        "vLLM 0.32.0 routes through us where its routers are known",
    )
    assert on["details"].count("\n") == len(PATCH_POINTS) - 1


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
