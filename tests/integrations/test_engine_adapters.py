"""The adapters of docs/integrations.md.

They are type-checked against the engines' signatures, and called as the engines call them.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
ENGINES = Path(__file__).with_name("engines")
ADAPTERS = ROOT / "examples" / "integrations"
T, H, E, K = 33, 16, 16, 4


@pytest.fixture
def load(monkeypatch):
    """Import modules of the adapters and of the engines' patch points, and forget them again."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(ENGINES))
    monkeypatch.syspath_prepend(str(ADAPTERS))
    torch.manual_seed(0)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in {
            "megatron",
            "sglang",
            "tensorrt_llm",
            "torchtitan",
        } or name.endswith("_adapter"):
            del sys.modules[name]


def dense(weights, ids):
    return torch.zeros(len(ids), E, dtype=weights.dtype).scatter(1, ids.long(), weights)


@pytest.mark.slow
def test_adapters_pass_mypy_against_the_engines_signatures():
    files = sorted(map(str, ADAPTERS.glob("*.py")))
    assert len(files) == 7
    environment = {"MYPYPATH": str(ENGINES), "PATH": ""}
    command = [sys.executable, "-m", "mypy", *files]  # strict, by pyproject.toml
    checked = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("renormalize", [True, False])
def test_sglangs_plain_layers_route_through_us(load, renormalize):
    topk = load("sglang.srt.layers.moe.topk")
    plain = topk.TopK(topk.TopKConfig(K, renormalize=renormalize))
    others = [
        topk.TopK(topk.TopKConfig(K, use_grouped_topk=True)),
        topk.TopK(
            topk.TopKConfig(K, shared_experts=topk.SharedExpertsConfig(num_fused_shared_experts=1))
        ),
        topk.TopK(topk.TopKConfig(K, fused_gate_packed_ids=True)),
        topk.TopK(topk.TopKConfig(K, correction_bias=torch.zeros(E))),
        topk.TopK(topk.TopKConfig(K, scoring_func="sigmoid")),
    ]
    hidden, logits = torch.randn(T, H), torch.randn(T, E)
    theirs = plain(hidden, logits)
    assert load("sglang_adapter").adapt(torch.nn.ModuleList([plain, *others]), "qwen3_moe") == 1
    ours = plain(hidden, logits)
    assert (ours.topk_weights.dtype, ours.topk_ids.dtype) == (torch.float32, torch.int32)
    assert torch.equal(ours.topk_ids, theirs.topk_ids)
    torch.testing.assert_close(ours.topk_weights, theirs.topk_weights)
    assert all(layer.topk_config.custom_routing_function is None for layer in others)


def test_tensorrt_llms_modules_take_our_routing_method(load):
    routing = load("tensorrt_llm._torch.modules.fused_moe.routing")
    experts, logits, bias = torch.randn(E, H), torch.randn(T, E), torch.rand(E)
    method = load("tensorrt_llm_adapter").MoeRoutingMethod("glm4_moe", K, lambda: bias)
    ids, weights = method.apply(logits)
    assert (ids.dtype, weights.dtype) == (torch.int32, torch.float32)
    assert method.routing_method_type is routing.RoutingMethodType.Unspecified
    scores = logits.sigmoid()
    selected = (scores + bias).topk(K).indices
    expected = scores.gather(1, selected)
    expected = dense(expected / expected.sum(-1, keepdim=True), selected)
    torch.testing.assert_close(routing.run_moe(method, logits, experts), expected @ experts)


@pytest.mark.filterwarnings(
    "ignore:In CPU autocast:UserWarning"
)  # torchtitan asks for float32 so; here that is no autocast
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(
    ("groups", "score", "norm"),
    [(None, "softmax", False), (None, "sigmoid", True), (4, "sigmoid", True)],
)
def test_torchtitans_layers_route_and_train_through_us(load, groups, score, norm, biased):
    titan = load("torchtitan.models.common.moe")
    router = titan.TokenChoiceTopKRouter(
        H, E, groups, groups and 2, K, score, norm, 2.5, gate_bias=True
    )
    moe = titan.MoE(router, torch.randn(E, H), torch.rand(E) if biased else None)
    x = torch.randn(2, T, H)

    def passed():
        moe.zero_grad()
        output, counts = moe(x)
        output.square().sum().backward()
        return (
            output.detach(),
            counts,
            router.gate.weight.grad.clone(),
            router.gate.bias.grad.clone(),
        )

    theirs = passed()
    assert load("torchtitan_adapter").adapt(moe) == 1
    state = moe.state_dict().keys()
    torch.testing.assert_close(passed(), theirs, rtol=1e-4, atol=1e-4)
    assert state == moe.state_dict().keys()


def test_torchtitans_balanced_benchmark_router_is_left(load):
    titan = load("torchtitan.models.common.moe")
    router = titan.TokenChoiceTopKRouter(
        H, E, None, None, K, "softmax", 0, 1.0, 0, _debug_force_load_balance=True
    )
    assert load("torchtitan_adapter").adapt(torch.nn.ModuleList([router])) == 0


@pytest.fixture
def megatron(load):
    """The router module of megatron-core's patch point, routing through us, and its replay."""
    adapter, router = load("megatron_adapter"), load("megatron.core.transformer.moe.router")
    stock = router.topk_routing_with_score_function
    adapter.install()
    yield router, load("megatron.core.transformer.moe.router_replay").RouterReplay()
    adapter.uninstall()
    assert router.topk_routing_with_score_function is stock


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_megatrons_routers_get_dense_probabilities_and_a_map_from_us(megatron, dtype):
    router, _ = megatron
    logits = torch.randn(T, E).to(dtype).requires_grad_()
    probs, routing_map = router.topk_routing_with_score_function(logits, K, scaling_factor=2.5)
    assert (probs.dtype, routing_map.dtype) == (dtype, torch.bool)
    assert routing_map.sum(-1).eq(K).all()
    torch.testing.assert_close(probs.float().sum(-1), torch.full((T,), 2.5), rtol=1e-2, atol=0.0)
    probs.float().square().sum().backward()
    assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize("tokens", [T, 0])
def test_megatrons_replay_keeps_our_ids_and_brings_them_back(megatron, tokens):
    router, replay = megatron
    settings = {
        "num_groups": 4, "group_topk": 2, "score_function": "sigmoid",
        "expert_bias": torch.rand(E), "router_replay": replay,
    }  # fmt: skip
    recorded = router.topk_routing_with_score_function(torch.randn(tokens, E), K, **settings)
    (ids,) = replay.recorded
    assert ids.dtype is torch.int64
    assert torch.equal(torch.zeros(tokens, E, dtype=torch.bool).scatter(1, ids, 1), recorded[1])
    replay.targets.append(ids)
    logits = torch.randn(tokens, E, requires_grad=True)
    probs, routing_map = router.topk_routing_with_score_function(logits, K, **settings)
    assert torch.equal(routing_map, recorded[1])
    weights = logits.sigmoid().gather(1, ids)
    torch.testing.assert_close(probs, dense(weights / weights.sum(-1, keepdim=True), ids))
    assert replay.recorded == [ids]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"fused": True}, "fused: expected False"),
        ({"expert_bias": torch.zeros(E)}, "expert_bias: expected None with score_function 'soft"),
        ({"score_function": "sqrtsoftplus"}, "score_function: expected 'softmax' or 'sigmoid'"),
        ({"num_groups": 8, "group_topk": 5}, r"group_topk: expected at most topk \(4\), got 5"),
    ],
)
def test_what_megatron_would_ignore_or_give_to_another_kernel_is_refused(megatron, settings, said):
    router, _ = megatron
    with pytest.raises(ValueError, match=f"^{said}"):
        router.topk_routing_with_score_function(torch.randn(T, E), K, **settings)


MEGATRON = ("megatron-core==0.16.1",)
TORCHTITAN = (
    "torchtitan==0.3.0",
    "spmd_types==0.2.3",
    "tyro",
    "docstring_parser",
    "typeguard",
    "shtab",
    "einops",
    "torchdata",
    "torch_checkpointing",
)
SGLANG = (
    "sglang==0.5.23",
    "aiohappyeyeballs==2.7.1",
    "aiohttp==3.14.5",
    "aiosignal==1.4.0",
    "apache-tvm-ffi==0.1.11",
    "attrs==26.1.0",
    "compressed-tensors==0.20.0",
    "dill==0.4.1",
    "einops==0.8.2",
    "frozenlist==1.8.0",
    "gguf==0.19.0",
    "ipython==9.18.1",
    "loguru==0.7.3",
    "msgspec==0.22.0",
    "multidict==7.2.1",
    "orjson==3.13.0",
    "propcache==0.5.4",
    "pybase64==1.5.1",
    "pyzmq==27.3.0",
    "sentencepiece==0.2.3",
    "starlette==1.10.0",
    "traitlets==5.16.1",
    "yarl==1.25.1",
)
"""What each imports on a CPU; their full requirements name GPU builds."""


def answer(script, packages, site):
    """Run a script of this folder, and return the JSON that it prints.

    The packages are installed without their requirements, and are on the script's path, as the
    adapters are.
    """
    install = ["-m", "pip", "install", "-q", "--no-deps", "--target", str(site), *packages]
    subprocess.run([sys.executable, *install], check=True)
    path = os.pathsep.join([str(site), str(ADAPTERS), *sys.path])
    command = [sys.executable, str(Path(__file__).with_name(script))]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def parameters(file):
    """Return the parameters of the first moe_align_block_size in a file, without types."""
    function = next(
        node
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name == "moe_align_block_size"
    )
    for node in ast.walk(function.args):
        if isinstance(node, ast.arg):
            node.annotation = None
    return ast.unparse(function.args)


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.skipif(
    sys.version_info < (3, 11), reason="torchtitan 0.3 is for Python 3.11 and later"
)
def test_torchtitans_own_deepseek_v3_trains_to_the_same_losses_through_us(tmp_path):
    """A tiny DeepSeek-V3 of the installed torchtitan, ten steps, eager and compiled.

    The biases, which follow from how many tokens each expert got in each step, are equal. The
    losses are equal at the first step, and later within 0.1 %: torchtitan leaves the experts of a
    token unsorted, so their sum is rounded elsewhere, and its experts compute in bfloat16, where a
    last bit of the hidden states changes a result by up to 0.4 %.
    """
    runs = answer("train_torchtitan.py", TORCHTITAN, tmp_path)
    assert set(runs) == {"eager", "compiled"}
    for run in runs.values():
        ours, theirs = (torch.tensor(run[who]["losses"]) for who in ("ours", "theirs"))
        assert len(theirs) == 10
        assert theirs[-1] < theirs[0] / 10, "a model that does not learn would hide wrong gradients"
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=0.0)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0.0)
        assert run["ours"]["biases"] == run["theirs"]["biases"]


@pytest.mark.slow
@pytest.mark.network
def test_megatron_cores_own_routers_route_train_and_replay_through_us(tmp_path):
    """The installed megatron-core's TopKRouter and RouterReplay, on a CPU.

    Every score function, with a bias and without, without groups and with groups that are judged by
    their best one, two and three. Maps, records and counts of tokens are equal, probabilities and
    gradients to the last bits of float32. So are losses that balance experts, and their gradients;
    biases after an update are equal.
    """
    said = answer("route_megatron.py", MEGATRON, tmp_path)
    assert f"megatron-core=={said['version']}" in MEGATRON
    assert len(said["cases"]) == 72
    for name, case in said["cases"].items():
        assert case["selected"] >= 64, name
        assert case["equal"] == {"map": True, "recorded": True, "counts": True}, name
        assert case["dtypes"] == ["torch.float32", "torch.bool"], name
        assert case["apart"] <= 1e-6 * max(1.0, case["largest"]), name
    balanced = said["balancing"]
    assert set(balanced["apart"]) == {
        "softmax, one batch",
        "softmax, sequences",
        "sigmoid, one batch",
        "sigmoid, sequences",
        "z",
    }
    assert max(balanced["apart"].values()) <= 2e-6, balanced["apart"]
    assert balanced["biases are equal"]


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.skipif(
    sys.version_info < (3, 11), reason="what SGLang imports is pinned for Python 3.11 and later"
)
def test_sglangs_own_layers_route_through_us(tmp_path):
    """The installed SGLang's TopK layers and select_experts, on a CPU.

    ``route_sglang.py`` says by which of its ways.
    """
    said = answer("route_sglang.py", SGLANG, tmp_path)
    assert said["recorded"] == {"read": True, "written": True}
    assert said["adapted"] == 3
    assert len(said["differences"]) == 6
    assert max(said["differences"].values()) < 1e-6
    assert all(said["equal ids"].values())
    assert all(dtypes == ["torch.float32", "torch.int32"] for dtypes in said["dtypes"].values())
    assert {case: blanked for case, blanked in said["padding"].items() if "padded" in case} == {
        f"{name}, padded": [True, True] for name in ("renormalized", "not renormalized", "scaled")
    }  # SGLang blanks these rows after our function, as after its own
    assert said["left"] == dict.fromkeys(
        ("grouped", "biased", "sigmoid", "packed", "custom", "shared"), True
    )
    aligned = "sglang/srt/layers/moe/moe_runner/triton_utils/moe_align_block_size.py"
    assert parameters(tmp_path / aligned) == parameters(ENGINES / aligned)
