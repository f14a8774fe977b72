"""Patched models under the hooks, wrappers and copies of other libraries.

The libraries are the real ones, and come in every order.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import io
import itertools
import pickle
import subprocess
import sys
import textwrap
from types import MethodType

import accelerate
import peft
import pytest
import torch
import transformers
from accelerate.hooks import remove_hook_from_module, remove_hook_from_submodules
from packaging.version import Version
from torch import nn
from transformers import AutoModelForCausalLM, DeepseekV3Config, MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, MixtralTopKRouter

from moe_routing import MoeRoutingWarning
from moe_routing.integrations.transformers import disable, enable, patch, patched, routers, unpatch
from moe_routing.integrations.transformers._warnings import warn_once

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:`is_gradient_checkpointing`:FutureWarning"
    ),  # peft asks transformers for it
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
]
MAPPING_WORKS = importlib.util.find_spec("torchvision") is not None or Version(
    transformers.__version__
) >= Version("5.21")
IDS = torch.arange(14).view(2, 7)
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip
QWEN = {"moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 8}
DEEPSEEK = {
    "moe_intermediate_size": 16, "first_k_dense_replace": 0, "num_key_value_heads": 4,
    "n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "qk_nope_head_dim": 8,
}  # fmt: skip


def mixtral():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MixtralConfig(**SIZES)).eval()


def qwen(**settings):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(Qwen3MoeConfig(**SIZES | QWEN | settings)).eval()


def deepseek():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(DeepseekV3Config(**SIZES | DEEPSEEK)).eval()


def gates(model):
    return [module for module in model.modules() if isinstance(module, MixtralTopKRouter)]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def routed(model):
    """Count the routings that a forward pass takes from us, by the state that each router keeps."""
    found = [module for module in model.modules() if type(module).__module__ == routers.__name__]
    for module in found:
        vars(module).pop(routers.STATE, None)
    logits(model)
    return sum(routers.STATE in vars(module) for module in found)


def assert_own(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def assert_no_mark(model):
    """Assert that nothing of ours is left in a model: no class, no attribute, no bound method."""
    for module in model.modules():
        assert all("moe_routing" not in base.__module__ for base in type(module).__mro__), type(
            module
        )
        assert not any("moe_routing" in name for name in vars(module))
        for value in vars(module).values():
            for called in (value, getattr(value, "__wrapped__", None)):
                function = getattr(called, "__func__", None)
                assert function is None or "moe_routing" not in function.__code__.co_filename


# accelerate


def on_several_places(model, folder):
    places = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "disk",
    }
    places |= {"lm_head": "cpu", "model.rotary_emb": "cpu"}
    return accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=folder, force_hooks=True
    )


PLACED = {
    "one place with hooks": lambda model, _: accelerate.dispatch_model(
        model, {"": "cpu"}, force_hooks=True
    ),
    "cpu and disk": on_several_places,
    "cpu_offload": lambda model, _: accelerate.cpu_offload(model, execution_device="cpu"),
    "disk_offload": lambda model, folder: accelerate.disk_offload(
        model, folder, execution_device="cpu"
    ),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:accelerate", "ignore::FutureWarning:accelerate")
@pytest.mark.parametrize("place", PLACED)
def test_patch_before_and_after_accelerates_hooks_and_unpatch_in_any_order(place, tmp_path):
    theirs = logits(mixtral())
    steps = {
        "patch": lambda model: assert_replaced(patch(model)),
        "place": lambda model: PLACED[place](model, tmp_path / str(next(folders))),
        "remove": remove_hook_from_submodules,
        "unpatch": unpatch,
    }
    folders = itertools.count()
    for order in (
        ("patch", "place", "unpatch"),
        ("patch", "place", "remove", "unpatch"),
        ("patch", "place", "unpatch", "remove"),
        ("place", "patch", "unpatch"),
        ("place", "patch", "remove", "unpatch"),
        ("place", "patch", "unpatch", "remove"),
        ("patch", "place", "unpatch", "patch", "unpatch"),
        ("place", "patch", "patch", "unpatch", "patch", "remove", "patch", "unpatch"),
    ):
        model = mixtral()
        is_patched = False
        for index, step in enumerate(order):
            steps[step](model)
            is_patched = {"patch": True, "unpatch": False}.get(step, is_patched)
            if "remove" not in order[: index + 1] or (
                "offload" not in place and place != "cpu and disk"
            ):
                assert_own(logits(model), theirs)
                assert routed(model) == 2 * is_patched, (order, step)
        assert_no_mark(model)


def assert_replaced(report, number=2):
    assert (len(report.replaced), len(report.layers)) == (number, number), report


@pytest.mark.filterwarnings("ignore::UserWarning:accelerate")
def test_the_report_says_which_backend_routes_where_weights_are_offloaded(tmp_path):
    model = accelerate.disk_offload(mixtral(), tmp_path, execution_device="cpu")
    assert [layer.backend for layer in patch(model).layers] == ["eager", "eager"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:accelerate")
@pytest.mark.parametrize("first", ["enable", "load"])
def test_from_pretrained_with_a_device_map_of_cpu_and_disk(first, tmp_path):
    mixtral().save_pretrained(tmp_path / "model")
    theirs = logits(mixtral())
    places = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
    }
    places |= {"lm_head": "cpu", "model.rotary_emb": "cpu"}
    if first == "enable":
        if not MAPPING_WORKS:
            pytest.skip("this transformers' patch mapping needs torchvision")
        enable()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map=places, offload_folder=tmp_path / "off"
        )
    finally:
        disable()
    if first == "load":
        assert_own(logits(model), theirs)
    assert_replaced(patch(model))
    assert_own(logits(model), theirs)
    assert routed(model) == 2
    unpatch(model)
    assert_own(logits(model), theirs)
    assert_no_mark(model)


def test_accelerates_hook_over_a_wrapper_is_named_with_the_way_out():
    model = mixtral()
    gate = gates(model)[0]
    inner = gate.forward
    gate.forward = lambda hidden: inner(hidden * 0.5)
    theirs = logits(model)
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    with pytest.warns(
        MoeRoutingWarning,
        match=r"accelerate's hook calls .*<lambda> in place of its forward; call accelerate",
    ):
        report = patch(model)
    assert [layer.replaced for layer in report.layers] == [False, True]
    assert_own(logits(model), theirs)
    remove_hook_from_module(gate)


# PEFT


LORA = {
    "target_parameters": {"target_parameters": ["mlp.gate.weight"], "target_modules": ["q_proj"]},
    "modules_to_save": {"modules_to_save": ["gate"], "target_modules": ["q_proj"]},
    "experts and router": {
        "target_parameters": ["gate.weight", "experts.gate_up_proj", "experts.down_proj"]
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("first", ["patch", "peft"])
@pytest.mark.parametrize("lora", LORA)
def test_peft_on_the_router_trains_and_merges_as_without_us(lora, first):
    def results(ours):
        model = qwen()
        if ours and first == "patch":
            assert_replaced(patch(model))
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=4, init_lora_weights=False, **LORA[lora])
        )
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data.normal_(0.0, 0.1)
            elif "original_module" in name:
                parameter.data.zero_()  # nobody may read it
        if ours:
            assert_replaced(patch(model), 4 if lora == "modules_to_save" else 2)
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        adapted = logits(model)
        merged = model.merge_and_unload()
        if ours:
            assert_replaced(patch(merged))
            assert routed(merged) == 2
        after = logits(merged)
        unpatch(merged)
        assert_no_mark(merged)
        return adapted, gradients, after, logits(merged)

    ours, theirs = results(ours=True), results(ours=False)
    assert any("gate" in name for name in theirs[1])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lora", LORA)
def test_unpatch_in_a_peft_model_leaves_its_adapters(lora):
    model = peft.get_peft_model(qwen(), peft.LoraConfig(r=4, init_lora_weights=False, **LORA[lora]))
    theirs = logits(model)
    with patched(model) as report:
        assert report.left == ()
        assert_own(logits(model), theirs)
    assert torch.equal(logits(model), theirs)
    assert_no_mark(model)


# torch


def test_a_data_parallel_replica_routes_by_its_own_weights():
    model = mixtral()
    patch(model)
    gate = gates(model)[0]
    replica = (
        gate._replicate_for_data_parallel()
    )  # what nn.parallel.replicate does with each module
    replica.weight = gate.weight.detach().flip(0)
    hidden = torch.randn(5, 32)
    copied = mixtral().model.layers[0].mlp.gate
    copied.weight.data = gate.weight.detach().flip(0)
    with torch.no_grad():
        torch.testing.assert_close(replica(hidden), copied(hidden))
        assert not torch.equal(replica(hidden)[0], gate(hidden)[0])


@pytest.mark.parametrize("first", ["patch", "parametrize"])
def test_a_parametrized_router(first):
    class Doubled(nn.Module):
        def forward(self, weight):
            return weight * 2

    model = mixtral()
    gate = gates(model)[0]
    stock = nn.utils.parametrize.register_parametrization(copy.deepcopy(gate), "weight", Doubled())
    hidden = torch.randn(5, 32)
    steps = [
        lambda: patch(model),
        lambda: nn.utils.parametrize.register_parametrization(gate, "weight", Doubled()),
    ]
    for step in steps if first == "patch" else steps[::-1]:
        step()
    assert_replaced(patch(model))
    with torch.no_grad():
        torch.testing.assert_close(gate(hidden), stock(hidden))
        unpatch(model)
        assert_no_mark(model)
        assert torch.equal(gate(hidden)[1], stock(hidden)[1])
    assert type(gate).__name__ == type(stock).__name__
    nn.utils.parametrize.remove_parametrizations(gate, "weight")
    assert type(gate) is MixtralTopKRouter


FSDP = """
    import os, sys, torch, torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM, MixtralConfig
    from moe_routing.gating import Gate
    from moe_routing.integrations.transformers import patch, unpatch

    gated, call = [], Gate.__call__
    Gate.__call__ = lambda *given, **said: gated.append(given[2].shape) or call(*given, **said)
    store = "file://" + sys.argv[1]
    dist.init_process_group("gloo", init_method=store, rank=int(sys.argv[2]), world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    ids = torch.arange(14).view(2, 7)

    def model():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(MixtralConfig(**{sizes}))

    def trained(model):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        gate = model.model.layers[0].mlp.gate.weight
        grad = gate.grad.full_tensor() if hasattr(gate.grad, "full_tensor") else gate.grad
        gate.grad = None
        return loss.detach(), grad

    theirs = trained(model())
    orders = ("patch first", "shard first", "shard, patch, unpatch", "patch, shard, unpatch")
    for shard_router in (True, False):
        for order in orders:
            m = model()
            stock = [type(layer.mlp.gate) for layer in m.model.layers]
            if order.startswith("patch"):
                patch(m)
            for layer in m.model.layers:
                if shard_router:
                    fully_shard(layer.mlp.gate, mesh=mesh)
                fully_shard(layer, mesh=mesh)
            fully_shard(m, mesh=mesh)
            report = patch(m)
            assert len(report.replaced) == len(report.layers) == 2, report
            assert report.layers[0].router == "mixtral.MixtralTopKRouter", report
            torch.testing.assert_close(trained(m), theirs, rtol=1e-4, atol=1e-6)
            assert "_moe_routing" in vars(m.model.layers[0].mlp.gate)
            report = patch(m, gate=True)
            assert [layer.gated for layer in report.gates] == [True, True], report
            gated.clear()
            torch.testing.assert_close(trained(m), theirs, rtol=1e-4, atol=1e-6)
            assert gated == [torch.Size([8, 32])] * 2, gated
            if order.endswith("unpatch"):
                unpatch(m)
                torch.testing.assert_close(trained(m), theirs, rtol=1e-4, atol=1e-6)
                for layer in m.model.layers:
                    names = [base.__module__ for base in type(layer.mlp.gate).__mro__]
                    assert not any("moe_routing" in name for name in names), names
                    name = ("FSDP" if shard_router else "") + "MixtralTopKRouter"
                    assert type(layer.mlp.gate).__name__ == name
    dist.destroy_process_group()
    print("held", flush=True)
    os._exit(0)
"""


EXPERT_PARALLEL = """
    import os, socket, sys, torch, torch.distributed as dist
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig
    from moe_routing.integrations.transformers import disable, enable, experts, patch, unpatch

    plans, combine = [], experts.combine
    experts.combine = lambda *given: plans.append(given[1]) or combine(*given)
    rank = int(sys.argv[2])
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=2)
    if hasattr(DistributedConfig(), "ep_size"):
        parallel = DistributedConfig(tp_size=2, ep_size=2)
    else:
        parallel = DistributedConfig(tp_size=2, enable_expert_parallel=True)

    def logits(model):
        with torch.no_grad():
            return model(input_ids=torch.arange(14).view(2, 7), use_cache=False).logits

    def load():
        return AutoModelForCausalLM.from_pretrained({folder}, distributed_config=parallel).eval()

    theirs = logits(load())
    for enabled in {enabled}:
        if enabled:
            enable()
        model = load()
        disable()
        report = patch(model, experts=True, gate=enabled)
        assert len(report.replaced) == len(report.layers) == 2, report
        assert [layer.gated for layer in report.gates] == [True, True] * enabled, report
        assert [layer.before for layer in report.experts] == ["grouped_mm"] * 2, report
        plans.clear()
        torch.testing.assert_close(logits(model), theirs, rtol=1e-4, atol=1e-5)
        assert len(plans) == 2
        assert all((plan.inverse >= plan.offsets[-1]).any() for plan in plans)  # of the other rank
        gates = [layer.mlp.gate for layer in model.model.layers]
        assert all("_moe_routing" in vars(gate) for gate in gates)
        unpatch(model)
        assert torch.equal(logits(model), theirs)
        assert all(type(gate).__module__.startswith("transformers.models.") for gate in gates)
        assert not any("_moe_routing" in vars(gate) for gate in gates)
    dist.destroy_process_group()
    print("held", flush=True)
    os._exit(0)
"""


def run_processes(code, tmp_path, *, number=1, **values):
    """Run a script in new processes, and return what each printed.

    Each gets a file that all share, and its rank. Scripts with a group end by ``os._exit``: a group
    that something still holds may abort the process while Python ends, which is torch's own affair.
    """
    text = textwrap.dedent(code)
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", repr(value))
    script = tmp_path / "script.py"
    script.write_text(text)
    commands = [
        [sys.executable, "-W", "ignore", str(script), str(tmp_path / "store"), str(rank)]
        for rank in range(number)
    ]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    outputs = [process.communicate() for process in running]
    for process, (_, errors) in zip(running, outputs, strict=True):
        assert process.returncode == 0, errors
    return [printed.strip() for printed, _ in outputs]


@pytest.mark.slow
def test_fsdp2_on_the_router_and_above_it(tmp_path):
    assert run_processes(FSDP, tmp_path, number=2, sizes=SIZES) == ["held", "held"]


@pytest.mark.slow
def test_transformers_expert_parallelism_before_and_after(tmp_path):
    mixtral().save_pretrained(tmp_path / "model")
    said = {
        "folder": str(tmp_path / "model"),
        "enabled": (False, True) if MAPPING_WORKS else (False,),
    }
    assert run_processes(EXPERT_PARALLEL, tmp_path, number=2, **said) == ["held", "held"]


def test_the_wrapper_of_older_expert_parallelism_is_followed_both_ways():
    """Expert parallelism of transformers 5.17 wraps the router's forward in a closure.

    The code below does so too, under the name of that module.
    """
    from transformers.distributed import tensor_parallel

    code = """
def install(module):
    original_forward = module.forward

    def tp_forward(*args, **kwargs):
        return original_forward(*args, **kwargs)

    module.forward = tp_forward
"""
    names = {"__name__": tensor_parallel.__name__}
    exec(code, names)  # noqa: S102 -- the globals say whose code it is
    for order in ("patch first", "wrap first"):
        model = mixtral()
        theirs = logits(model)
        if order == "patch first":
            patch(model)
        for gate in gates(model):
            names["install"](gate)
        assert_replaced(patch(model))
        assert_own(logits(model), theirs)
        assert routed(model) == 2
        unpatch(model)
        assert_no_mark(model)
        for gate in gates(model):
            (cell,) = vars(gate)["forward"].__closure__
            assert cell.cell_contents.__func__ is MixtralTopKRouter.forward
        assert torch.equal(logits(model), theirs)


# copies and pickles


def saved_by_torch(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),  # noqa: S301 -- its own
    "torch.save": saved_by_torch,
}


@pytest.mark.parametrize("called", [True, False])
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_is_patched_as_the_original_and_unpatched_alone(way, called):
    model = mixtral()
    theirs = logits(model)
    report = patch(model)
    if called:
        logits(model)
    copied = COPIES[way](model)
    assert all(type(gate) is routers.MixtralTopKRouter for gate in gates(copied))
    assert patch(copied) == report
    assert_own(logits(copied), theirs)
    assert routed(copied) == 2
    gates(copied)[0].weight.data.zero_()
    assert not torch.allclose(logits(copied), theirs)
    unpatch(copied)
    assert_no_mark(copied)
    assert routed(model) == 2
    assert_own(logits(model), theirs)


LOADED = """
    import sys, torch
    from moe_routing.gating import Gate
    gated, call = [], Gate.__call__
    Gate.__call__ = lambda *given, **said: gated.append(given) or call(*given, **said)
    model = torch.load({file}, weights_only=False)
    from moe_routing.integrations.transformers import patch, routers, unpatch
    gate = model.model.layers[0].mlp.gate
    assert type(gate) is routers.MixtralTopKRouter
    with torch.no_grad():
        ours = model(input_ids=torch.arange(14).view(2, 7)).logits
        torch.testing.assert_close(ours, torch.load({logits}))
    assert len(gated) == (2 if {gate} else 0)
    assert len(patch(model).replaced) == 2
    unpatch(model)
    assert type(gate).__module__ == "transformers.models.mixtral.modeling_mixtral"
    print("held")
"""


@pytest.mark.slow
@pytest.mark.parametrize("gate", [False, True])
def test_a_patched_model_is_loaded_in_a_new_process(gate, tmp_path):
    model = mixtral()
    patch(model, gate=gate)
    torch.save(logits(model), tmp_path / "logits.pt")
    torch.save(model, tmp_path / "model.pt")
    files = {"file": str(tmp_path / "model.pt"), "logits": str(tmp_path / "logits.pt")}
    assert run_processes(LOADED, tmp_path, gate=gate, **files) == ["held"]


def test_every_supported_router_has_a_class_that_is_found_by_name():
    for name in ("MixtralTopKRouter", "DeepseekV3TopkRouter", "DbrxFFN", "Gemma4TextRouter"):
        cls = getattr(routers, name)
        assert pickle.loads(pickle.dumps(cls)) is cls  # noqa: S301 -- its own
        assert (cls.__name__, cls.__module__) == (name, routers.__name__)
        assert name in dir(routers)
    with pytest.raises(AttributeError, match="has no attribute 'NoSuchRouter'"):
        _ = routers.NoSuchRouter


def test_a_class_whose_code_is_not_known_here_says_so_when_it_is_unpickled(monkeypatch):
    monkeypatch.setattr(MixtralTopKRouter, "forward", lambda _self, hidden: hidden)
    with pytest.raises(
        ImportError,
        match=r"MixtralTopKRouter cannot route through moe_routing here: the forward of",
    ):
        _ = routers.MixtralTopKRouter


# wrappers of others


def halved(call):
    """Wrap a bound forward as a temperature or a LoRA does."""

    @functools.wraps(call)
    def forward(hidden):
        return call(hidden * 0.5)

    return forward


def with_wrapped_instances(model):
    for gate in gates(model):
        gate.forward = halved(gate.forward)


def halved_method(self, hidden):
    return MixtralTopKRouter.forward(self, hidden * 0.5)


def with_bound_method(model):
    for gate in gates(model):
        gate.forward = MethodType(halved_method, gate)


@pytest.mark.parametrize("wrap", [with_wrapped_instances, with_bound_method])
def test_a_router_that_somebody_wrapped_before_is_left_with_who_and_the_way_out(wrap):
    model = mixtral()
    wrap(model)
    theirs, kept = logits(model), [gate.forward for gate in gates(model)]
    with pytest.warns(
        MoeRoutingWarning,
        match=r"its forward was replaced before, by .*halved.*; take that off, call patch",
    ):
        report = patch(model)
    assert len(report.left) == 2
    assert torch.equal(logits(model), theirs)
    unpatch(model)
    assert [gate.forward for gate in gates(model)] == kept
    assert_no_mark(model)


def test_a_wrapper_that_was_set_after_patch_stays_in_force_and_survives_unpatch():
    stock = mixtral()
    with_wrapped_instances(stock)
    theirs = logits(stock)
    model = mixtral()
    patch(model)
    with_wrapped_instances(model)
    assert_own(logits(model), theirs)
    assert_replaced(patch(model))
    assert routed(model) == 2
    unpatch(model)
    assert torch.equal(logits(model), theirs)
    assert all("forward" in vars(gate) for gate in gates(model))


def test_a_router_replaced_after_patch_by_what_does_not_call_it_is_left():
    model = mixtral()
    patch(model)
    with_bound_method(model)
    theirs = logits(model)
    with pytest.warns(
        MoeRoutingWarning,
        match=r"its forward was replaced after patch, by .*halved_method, which does not",
    ):
        patch(model)
    assert torch.equal(logits(model), theirs)
    assert_no_mark(model)


original = MixtralTopKRouter.forward


def scaled(self, hidden):
    return original(self, hidden * 0.5)


def recorded(self, hidden):
    scores, weights, ids = original(self, hidden)
    return scores, weights, (ids + 1) % scores.shape[-1]


@functools.wraps(original)
def wrapped(self, *args, **kwargs):
    output = original(self, *args, **kwargs)
    return (*output[:1], output[1] * 3.0, *output[2:])


def made(first):
    def inside(self, hidden):
        return first(self, hidden * 0.5)

    return inside


class Callable:
    """A wrapper that is no function, and therefore gets no self."""

    def __call__(self, hidden):
        return hidden, hidden, hidden


WRAPPERS = {"scaled": scaled, "recorded": recorded, "wraps": wrapped, "closure": made(original)}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_class_that_somebody_wrapped_before_is_left_with_who_did(wrapper, monkeypatch):
    monkeypatch.setattr(MixtralTopKRouter, "forward", WRAPPERS[wrapper])
    model = mixtral()
    theirs = logits(model)
    with pytest.warns(
        MoeRoutingWarning,
        match=r"the forward of MixtralTopKRouter was replaced, by .*test_transformers_hooks",
    ):
        report = patch(model)
    assert len(report.left) == 2
    assert torch.equal(logits(model), theirs)


def test_a_class_whose_forward_is_no_function_is_left(monkeypatch):
    model = mixtral()
    monkeypatch.setattr(MixtralTopKRouter, "forward", Callable())
    with pytest.warns(MoeRoutingWarning, match="was replaced, by .*Callable"):
        assert len(patch(model).left) == 2


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_class_that_somebody_wraps_after_patch_runs_the_wrapper_and_says_so(wrapper, monkeypatch):
    model = mixtral()
    own = logits(model)
    patch(model)
    warn_once.cache_clear()
    with monkeypatch.context() as patches:
        patches.setattr(MixtralTopKRouter, "forward", WRAPPERS[wrapper])
        theirs = logits(mixtral())
        with pytest.warns(
            MoeRoutingWarning,
            match=r"the forward of MixtralTopKRouter was replaced after patch, by .*hooks",
        ):
            ours = logits(model)
        assert torch.equal(ours, theirs)
        with pytest.warns(MoeRoutingWarning, match="was replaced, by"):
            assert len(patch(model).left) == 2
        assert_no_mark(model)
    assert_replaced(patch(model))
    assert_own(logits(model), own)
    assert routed(model) == 2


def fused(_self, hidden):
    return hidden * 0.0


def test_a_block_whose_class_was_replaced_is_left_and_says_who_did(monkeypatch):
    monkeypatch.setattr(MixtralSparseMoeBlock, "forward", fused)
    model = mixtral()
    reason = (
        r"the forward of mixtral.MixtralSparseMoeBlock around it was replaced, by .*hooks.fused; "
        "put the class's own back"
    )
    with pytest.warns(MoeRoutingWarning, match=reason):
        assert len(patch(model).left) == 2
    assert_no_mark(model)


@pytest.mark.parametrize("level", ["class", "instance"])
def test_a_block_replaced_after_patch_is_left_by_the_next_patch(level, monkeypatch):
    model = mixtral()
    patch(model)
    if level == "class":
        monkeypatch.setattr(MixtralSparseMoeBlock, "forward", fused)
    else:
        for layer in model.model.layers:
            layer.mlp.forward = MethodType(fused, layer.mlp)
    with pytest.warns(MoeRoutingWarning, match=r"around it was replaced, by .*hooks.fused"):
        assert len(patch(model).left) == 2
    assert_no_mark(model)


def test_a_wrapper_on_our_own_class_is_not_dropped_without_a_word(monkeypatch):
    model = mixtral()
    patch(model)
    cls = routers.MixtralTopKRouter
    inner = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, hidden: inner(self, hidden * 0.5))
    with pytest.warns(
        MoeRoutingWarning, match=r"<lambda> replaced the forward of moe_routing's class"
    ):
        unpatch(model)
    with pytest.warns(
        MoeRoutingWarning, match=r"the forward of moe_routing's class was replaced, by .*<lambda>"
    ):
        assert len(patch(model).left) == 2


# settings


SETTINGS = [
    (qwen, "top_k", 3),
    (qwen, "norm_topk_prob", True),
    (qwen, "norm_topk_prob", 1),
    (deepseek, "routed_scaling_factor", 1.0),
    (deepseek, "topk_group", 1),
    (deepseek, "norm_topk_prob", False),
    (deepseek, "num_group", 1),
    (deepseek, "num_group", 8),
]


@pytest.mark.parametrize(("build", "attribute", "value"), SETTINGS)
def test_a_setting_that_changes_after_patch_is_followed_at_the_next_call(build, attribute, value):
    model = build(norm_topk_prob=False) if build is qwen else build()
    before = logits(model)
    patch(model)
    assert_own(logits(model), before)
    for layer in model.model.layers:
        if attribute == "num_group":
            layer.mlp.gate.topk_group = (value + 1) // 2
        setattr(layer.mlp.gate, attribute, value)
    ours = logits(model)
    assert routed(model) == 2
    unpatch(model)
    theirs = logits(model)
    assert not torch.allclose(theirs, before)
    assert_own(ours, theirs)


@pytest.mark.parametrize(
    ("attribute", "value", "named"),
    [
        ("num_group", 0, "num_group=0"),
        ("num_group", 7, "num_group=7"),
        ("topk_group", 9, "topk_group=9"),
        ("routed_scaling_factor", float("nan"), "routed_scaling_factor=nan"),
        ("routed_scaling_factor", None, "routed_scaling_factor=None"),
    ],
)
def test_a_setting_that_cannot_be_followed_is_refused_by_name_and_leaves_only_its_layer(
    attribute, value, named
):
    model = deepseek()
    patch(model)
    setattr(model.model.layers[1].mlp.gate, attribute, value)
    with pytest.raises(
        ValueError,
        match=rf"^DeepseekV3TopkRouter: its settings .*{named}.*; unpatch\(model\) gives",
    ):
        logits(model)
    unpatch(model)
    with pytest.warns(MoeRoutingWarning, match=named):
        report = patch(model)
    assert [layer.replaced for layer in report.layers] == [True, False]


def test_a_setting_that_changes_after_compiling_is_followed():
    model = deepseek()
    gate = model.model.layers[0].mlp.gate
    gate.requires_grad_(requires_grad=False)
    stock = copy.deepcopy(gate)
    patch(gate)
    torch.compiler.reset()
    compiled = torch.compile(gate, fullgraph=True, backend="eager")
    hidden = torch.randn(40, 32)
    compiled(hidden)
    gate.topk_group = stock.topk_group = 1
    gate(hidden)
    by_expert = lambda output: torch.zeros(40, 16).scatter(1, output[2], output[1])  # noqa: E731 -- ids come in another order
    torch.testing.assert_close(by_expert(compiled(hidden)), by_expert(stock(hidden)))
    torch.compiler.reset()


# the report


DOGE = {
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 32,
}


def test_doges_blocks_are_left_with_the_reason():
    from transformers import DogeConfig

    model = AutoModelForCausalLM.from_config(
        DogeConfig(**DOGE, is_moe=True, num_experts=16, num_experts_per_tok=2)
    )
    with pytest.warns(MoeRoutingWarning, match="two product keys"):
        report = patch(model)
    assert [(layer.router, layer.replaced) for layer in report.layers] == [
        ("doge.DogeCDMoE", False)
    ] * 2
    assert patch(AutoModelForCausalLM.from_config(DogeConfig(**DOGE, is_moe=False))).layers == ()


def test_jetmoe_has_one_line_for_each_router():
    from transformers import JetMoeConfig

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "kv_channels": 8,
        "vocab_size": 32,
    }
    model = AutoModelForCausalLM.from_config(
        JetMoeConfig(**sizes, num_key_value_heads=2, num_local_experts=4)
    ).eval()
    theirs = logits_of(model)
    report = patch(model)
    assert [layer.router for layer in report.layers] == ["jetmoe.JetMoeTopKGating"] * 4
    assert report.left == ()
    assert_own(logits_of(model), theirs)


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=IDS % 32, use_cache=False).logits


def test_a_router_that_two_blocks_share_has_one_line():
    model = mixtral()
    model.model.layers[1].mlp.gate = model.model.layers[0].mlp.gate
    theirs = logits(model)
    assert_replaced(patch(model), 1)
    assert_own(logits(model), theirs)


@pytest.mark.parametrize("value", [0, 99, "missing"])
def test_a_router_without_a_possible_k_is_left(value):
    model = mixtral()
    gate = model.model.layers[1].mlp.gate
    if value == "missing":
        del gate.top_k
    else:
        gate.top_k = value
    with pytest.warns(MoeRoutingWarning, match=r"its settings cannot be routed: .*top_?k"):
        assert [layer.replaced for layer in patch(model).layers] == [True, False]


def test_a_setting_that_is_missing_leaves_its_layer_and_is_named_at_the_next_call():
    model = qwen()
    patch(model)
    del model.model.layers[1].mlp.gate.norm_topk_prob
    with pytest.raises(ValueError, match="norm_topk_prob='missing'"):
        logits(model)
    with pytest.warns(MoeRoutingWarning, match="norm_topk_prob='missing'"):
        assert [layer.replaced for layer in patch(model).layers] == [True, False]


def test_a_subclass_of_somebody_has_one_line():
    class MyRouter(MixtralTopKRouter):
        pass

    model = mixtral()
    model.model.layers[0].mlp.gate.__class__ = MyRouter
    with pytest.warns(MoeRoutingWarning, match=r"MyRouter is no router that is known here"):
        report = patch(model)
    assert [layer.replaced for layer in report.layers] == [False, True]
