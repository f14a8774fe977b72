"""With ``TRITON_INTERPRET=1`` users may name ``triton`` and ``triton-xpu`` on a CPU.

Nothing else changes.
"""

import json
import os
import subprocess
import sys

import pytest

from moe_routing_backends import triton
from moe_routing_backends.triton.runtime import router as launch
from moe_routing_registry import DeviceInfo, RejectCode, RoutingProblem, RoutingSpec, Toolchain
from moe_routing_registry.device import triton_interprets

CPU = DeviceInfo(
    type="cpu", platform="cpu", toolchains=(Toolchain(name="triton", version="3.7.1", usable=True),)
)
PROBLEM = RoutingProblem(spec=RoutingSpec(family="f"), num_experts=8, topk=2, dtype="float32")
VARIABLE = "TRITON_INTERPRET"


def targets():
    return {
        spec.name: {target.platform: target.explicit for target in spec.targets}
        for spec in triton.moe_routing_backends()
    }


def test_the_cpu_is_a_target_where_triton_interprets_and_only_for_those_who_name_the_backend(
    monkeypatch,
):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert targets() == {"triton": {"cuda": False, "rocm": False}, "triton-xpu": {"xpu": False}}
    monkeypatch.setenv(VARIABLE, "1")
    assert targets() == {
        "triton": {"cuda": False, "rocm": False, "cpu": True},
        "triton-xpu": {"xpu": False, "cpu": True},
    }
    assert triton.supports(PROBLEM, CPU)
    assert triton.supports_xpu(PROBLEM, CPU)


@pytest.mark.parametrize("platform", ["cuda", "rocm", "xpu"])
def test_a_gpu_is_declined_where_triton_interprets_because_it_compiles_nothing(
    monkeypatch, platform
):
    device = DeviceInfo(
        type=platform, platform=platform, warp_sizes=(16, 32), toolchains=CPU.toolchains
    )
    supports = triton.supports_xpu if platform == "xpu" else triton.supports
    monkeypatch.delenv(VARIABLE, raising=False)
    assert supports(PROBLEM, device)
    monkeypatch.setenv(VARIABLE, "true")
    verdict = supports(PROBLEM, device)
    assert (verdict.code, verdict.fix) == (RejectCode.TOOLCHAIN, "unset TRITON_INTERPRET")
    assert f"compiles none for {platform}" in verdict.reason


@pytest.mark.parametrize(
    "value", ["1", "true", "TRUE", "on", "yes", "y", "0", "", "false", "2", " 1"]
)
def test_the_variable_is_read_as_triton_reads_it(monkeypatch, value):
    knobs = pytest.importorskip("triton.knobs")
    monkeypatch.setenv(VARIABLE, value)
    assert triton_interprets() is knobs.runtime.interpret


@pytest.mark.parametrize("build", [launch.build, launch.build_for_xpu])
def test_a_variable_that_is_set_after_the_kernels_were_imported_is_named(monkeypatch, build):
    monkeypatch.setenv(VARIABLE, "1")
    with pytest.raises(
        RuntimeError, match=r"^TRITON_INTERPRET was changed .* set or unset it before Python starts"
    ):
        build(PROBLEM, CPU)


def interpreted(*command):
    done = subprocess.run(
        [sys.executable, "-W", "error", *command],
        env=os.environ | {VARIABLE: "1", "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    return done.stdout


ROUTE = """
import json, sys, threading
import torch, moe_routing

torch.manual_seed(5)
logits, scale, bias = torch.randn(5, 32), torch.rand(32) + 0.5, torch.rand(32)
logits[0, :3] = torch.nan
logits[1, 3] = torch.inf
operands = {
    "mixtral": {}, "gemma4": {"per_expert_scale": scale}, "deepseek_v3": {"bias": bias},
    "sparsemixer": {},
}
padded = {"ids_dtype": torch.int64, "num_valid_tokens": torch.tensor([3])}
found = {}
for name, given in operands.items():
    routers = [moe_routing.get_router(name, backend=backend) for backend in (sys.argv[1], "eager")]
    found[name] = []
    for more in ({}, padded, {"num_valid_tokens": 4}):
        ours, theirs = (route(logits, 2, **given, **more) for route in routers)
        close = torch.allclose(ours.weights, theirs.weights, rtol=1e-6, atol=0)
        found[name] += [torch.equal(ours.ids, theirs.ids), close]
    out = torch.empty(5, 2), torch.empty(5, 2, dtype=torch.int32)
    found[name] += [routers[0](logits, 2, **given, out=out).ids is out[1]]
    found[name] += [torch.equal(out[1], routers[1](logits, 2, **given).ids)]
    gradients = []
    for route in routers:
        leaf = logits.clone().requires_grad_()
        route(leaf, 2, **given).weights.square().sum().backward()
        gradients.append(leaf.grad)
    found[name] += [torch.allclose(*gradients, rtol=1e-5, atol=1e-6)]
route = moe_routing.get_router("mixtral", backend=sys.argv[1])
expected, results = route(logits, 2), []
threads = [threading.Thread(target=lambda: results.append(route(logits, 2))) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
found["threads"] = [len(results) == 4, *[torch.equal(r.ids, expected.ids) for r in results]]
found["notes"] = list(route.report.notes)
json.dump(found, sys.stdout)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "table"), [("triton", "sm_90.json"), ("triton-xpu", "xpu.json")]
)
def test_who_names_the_backend_gets_the_kernels_with_the_launches_of_its_gpus(backend, table):
    found = json.loads(interpreted("-c", ROUTE, backend))
    what, launches = found.pop("notes")
    assert "Triton's interpreter runs the kernels on the CPU" in what
    assert table in launches
    assert {len(agreed) for agreed in found.values()} == {9, 5}
    assert {case: agreed for case, agreed in found.items() if not all(agreed)} == {}


@pytest.mark.slow
def test_nothing_chooses_the_interpreter_by_itself_and_explain_and_doctor_say_what_it_is():
    script = """
import json, sys, torch, moe_routing
route = moe_routing.get_router("mixtral")
route(torch.randn(2, 8), 2)
report = moe_routing.explain("mixtral")
named = moe_routing.explain("mixtral", backend="triton")
code = report.rejection("triton").verdict.code.value
json.dump([route.backend, code, named.winner, list(named.notes)], sys.stdout)
"""
    chosen, code, named, notes = json.loads(interpreted("-c", script))
    assert (chosen, code, named) == ("eager", "explicit_only", "triton")
    assert "Triton's interpreter" in notes[0]
    report = json.loads(interpreted("-m", "moe_routing", "doctor", "--json"))
    said = [check["summary"] for check in report["checks"] if check["name"] == "triton"]
    assert any(
        "TRITON_INTERPRET is set: Triton interprets kernels on the CPU, for those who name" in text
        for text in said
    )
    assert {v["name"] for v in report["environment"]} >= {VARIABLE}
    backends = {backend["name"]: backend for backend in report["backends"]}
    for name in ("triton", "triton-xpu"):
        assert "cpu (when named)" in backends[name]["targets"]
        assert backends[name]["devices"]["cpu"]["code"] == "explicit_only"
    assert report["ok"]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["triton", "triton-xpu"])
def test_the_kit_runs_on_the_interpreter(backend):
    clauses = ("--clause", "7", "--clause", "9", "--json")
    report = json.loads(interpreted("-m", "moe_routing", "conformance", backend, *clauses))
    assert report["ok"]
    assert {result["status"] for result in report["results"]} == {"passed"}
