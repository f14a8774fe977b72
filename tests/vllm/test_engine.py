"""vLLM's whole engine on a CPU, without the plug-in, with it, and with it as on a CPU that has AMX.

Each runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import MODELS, NEW_TOKENS, PROMPT, SIZES, save

SERVE = Path(__file__).with_name("serve.py")
PARALLEL = ["qwen3_moe", "gemma4_text"]
LAYERS = SIZES["num_hidden_layers"]

UPSIDE_DOWN = """
from moe_routing_registry import BackendSpec, Target, hookimpl

def build(problem, device):
    from moe_routing_backends.eager.route import build as build_right

    right = build_right(problem, device)

    def bound(logits, **operands):
        result = right(logits, **operands)
        return result._replace(ids=logits.shape[1] - 1 - result.ids)

    return bound

@hookimpl
def moe_routing_backends():
    return [BackendSpec(name="upside-down", factories={"route": "upside_down:build"},
                        targets=(Target("*"),), priority=-1)]
"""


@pytest.fixture(scope="session")
def wrong_backend(tmp_path_factory):
    """A distribution whose backend mirrors the ids: the weights are right, the experts are not."""
    site = tmp_path_factory.mktemp("site")
    info = site / "upside_down-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: upside-down\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[moe_routing.backends]\nupside-down = upside_down\n")
    (site / "upside_down.py").write_text(UPSIDE_DOWN)
    return site


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return folder, save(folder)


@pytest.fixture(scope="session")
def served(checkpoints, wrong_backend, tmp_path_factory):
    """What the engine generated.

    It ran without the plug-in (``off``), with it (``on``), and with it as on a CPU with AMX
    (``amx``).
    """
    scratch = tmp_path_factory.mktemp("served")
    running = {}
    for mode in ("off", "on", "amx"):
        job = {
            "checkpoints": {model_type: str(checkpoints[0] / model_type) for model_type in MODELS},
            "prompt": PROMPT,
            "new_tokens": NEW_TOKENS,
            "prefer": "upside-down" if mode == "on" else None,
            "apart": "qwen3_moe" if mode == "off" else None,
            "environment": {"MOE_ROUTING_BACKEND": "upside-down"},
            "parallel": [] if mode == "amx" else PARALLEL,
            "amx": mode == "amx",
        }
        (scratch / f"{mode}.json").write_text(json.dumps(job))
        command = [
            sys.executable,
            str(SERVE),
            str(scratch / f"{mode}.json"),
            str(scratch / f"{mode}.out"),
        ]
        environment = os.environ | {
            "PYTHONPATH": str(wrong_backend),
            "MOE_ROUTING_VLLM": str(int(mode != "off")),
        }
        log = (scratch / f"{mode}.log").open("w")
        running[mode] = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    results = {}
    for mode, process in running.items():
        log = scratch / f"{mode}.log"
        assert process.wait() == 0, log.read_text()[-4000:]
        results[mode] = json.loads((scratch / f"{mode}.out").read_text()) | {"log": log.read_text()}
    return results


@pytest.mark.parametrize("model_type", MODELS)
def test_the_tokens_are_those_of_vllm_alone(served, model_type):
    alone = served["off"]["tokens"][model_type]
    assert served["on"]["tokens"][model_type] == alone
    assert len(set(alone)) > NEW_TOKENS // 4, (
        "a model that repeats itself would hide a wrong router"
    )


@pytest.mark.parametrize("model_type", MODELS)
def test_the_tokens_on_a_cpu_with_amx_are_the_same(served, model_type):
    """torch says that the CPU has AMX.

    vLLM then takes another latent attention, which refuses float32, but for our setting.
    """
    assert served["amx"]["tokens"][model_type] == served["off"]["tokens"][model_type]
    assert served["amx"]["calls"][model_type] > 0


@pytest.mark.parametrize("model_type", PARALLEL)
def test_two_tensor_parallel_workers_route_through_us_to_the_tokens_of_vllm_alone(
    served, model_type
):
    alone, ours = served["off"], served["on"]
    assert ours["parallel"][model_type] == alone["parallel"][model_type]
    assert len(set(alone["parallel"][model_type])) > NEW_TOKENS // 4
    assert [worker["active"] for worker in alone["workers"][model_type]] == [False, False]
    assert len(ours["workers"][model_type]) == 2
    for worker in ours["workers"][model_type]:
        (site,) = worker["sites"]
        assert (site["layers"], site["reason"]) == (LAYERS, "")
        assert site["calls"] >= LAYERS * NEW_TOKENS


# Not DeepSeek-V3: vLLM's latent attention on a CPU strays from transformers' even where no layer
# has experts.
@pytest.mark.parametrize("model_type", [name for name in MODELS if name != "deepseek_v3"])
def test_the_tokens_are_those_of_transformers(served, checkpoints, model_type):
    assert served["on"]["tokens"][model_type] == checkpoints[1][model_type]


@pytest.mark.parametrize("model_type", MODELS)
def test_a_wrong_router_of_ours_changes_the_tokens(served, model_type):
    assert served["on"]["preferred"][model_type] != served["on"]["tokens"][model_type]
    assert served["off"]["preferred"][model_type] == served["off"]["tokens"][model_type]


@pytest.mark.parametrize("model_type", MODELS)
def test_every_layer_calls_us_at_every_step(served, model_type):
    profiled = served["on"]["calls"][model_type] - LAYERS * NEW_TOKENS
    assert profiled >= 0
    assert profiled % LAYERS == 0
    assert served["off"]["calls"][model_type] == 0


def test_each_model_is_routed_by_its_own_formula(served):
    report = served["on"]["report"]
    assert report["active"]
    deepseek = (
        "ids = topk(sigmoid(l)+b) in the best 2 of 4 groups by sum of best 2; "
        "w = sigmoid(l)[ids] / (sum + 1e-20)"
    )
    assert {site["formula"]: site["layers"] for site in report["sites"]} == {
        "ids = topk(l); w = softmax(l[ids])": 2 * LAYERS,  # Qwen3-MoE and gpt-oss
        deepseek: LAYERS,
        "ids = topk(l); w = softmax(l[ids]) * per_expert_scale[ids]": LAYERS,
    }
    assert served["off"]["report"] == {"active": False, "refusal": "", "sites": []}


def test_doctor_shows_what_was_done_and_vllms_log_too(served):
    (check,) = served["on"]["doctor"]
    assert (
        check["status"],
        f"{4 * LAYERS} routers were replaced, 0 left alone" in check["summary"],
    ) == ("ok", True)
    assert "per_expert_scale[ids]" in check["details"]
    assert "moe-routing: CPURouter now computes ids = topk(l)" in served["on"]["log"]


def test_an_engine_core_in_its_own_process_loads_the_plug_in_itself(served):
    off = served["off"]
    assert off["apart"] != off["tokens"]["qwen3_moe"]  # MOE_ROUTING_BACKEND=upside-down reached it
    assert off["replaced_here"]["sites"] == []
