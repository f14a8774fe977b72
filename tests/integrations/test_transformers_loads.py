"""``patch(model, loads=monitor)``: the routers of a model count what they route."""

from __future__ import annotations

import copy
import pickle
import runpy
import warnings
from pathlib import Path
from types import FunctionType, SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from moe_routing import LoadMonitor
from moe_routing.integrations.transformers import patch, patched, recording, replaying, unpatch

AGAINST = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("against.py"))))
SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
NAMES = ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
TOKENS = 5
SLOTS = 2 * TOKENS
HERE = [case for case in AGAINST.CASES if AGAINST.is_here(case) and case.model != "axk2"]
"""Routers that are replaced with the first settings of their case."""


def mixtral():
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, **HEADS))


def prompt():
    return torch.arange(TOKENS)[None]


def totals(monitor):
    return {name: load.total for name, load in monitor.read().layers.items()}


@pytest.mark.parametrize("gate", [False, True])
def test_every_layer_counts_what_it_routes(gate):
    model, monitor = mixtral(), LoadMonitor()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    patch(model, gate=gate, loads=monitor)
    selected = {}
    for name in NAMES:
        model.get_submodule(name).register_forward_hook(
            lambda _module, _args, out, name=name: selected.update({name: out[2]})
        )
    model(prompt())
    for name in NAMES:
        expected = torch.bincount(selected[name].flatten(), minlength=8)
        assert torch.equal(monitor[name], expected)
        assert monitor[name].sum() == SLOTS
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("gate", [False, True])
def test_what_is_recorded_and_replayed_is_counted(gate):
    model, monitor = mixtral(), LoadMonitor()
    patch(model, gate=gate, loads=monitor)
    with recording(model) as records:
        model(prompt())
    recorded = {name: monitor[name].clone() for name in NAMES}
    for name, ids in zip(NAMES, records.ids, strict=True):
        assert torch.equal(recorded[name], ids.long().flatten().bincount(minlength=8))
    with torch.no_grad():
        for name in NAMES:
            model.get_submodule(name).weight.neg_()  # other experts would be selected
    with replaying(model, records):
        model(prompt())
    for name in NAMES:
        assert torch.equal(monitor[name], 2 * recorded[name])


def test_outputs_are_those_without_counts():
    plain, counting = mixtral(), mixtral()
    patch(plain)
    patch(counting, loads=LoadMonitor())
    assert torch.equal(plain(prompt()).logits, counting(prompt()).logits)


def test_generation_counts_each_step():
    model, monitor = mixtral().eval(), LoadMonitor()
    patch(model, loads=monitor)
    model.generate(prompt(), max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    assert totals(monitor) == dict.fromkeys(NAMES, 2 * (TOKENS + 2))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True, None])
def test_a_step_of_training_counts_once_with_checkpoints_too(reentrant):
    model, monitor = mixtral().train(), LoadMonitor()
    patch(model, loads=monitor)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    loss = model(prompt(), labels=prompt(), use_cache=False).loss
    loss.backward()
    assert totals(monitor) == dict.fromkeys(NAMES, SLOTS)
    assert all(model.get_submodule(name).weight.grad.any() for name in NAMES)


@pytest.mark.parametrize("gate", [False, True])
def test_a_compiled_model_counts(gate):
    model, monitor = mixtral(), LoadMonitor()
    patch(model, gate=gate, loads=monitor)
    layer = model.get_submodule(NAMES[0])
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for times in (1, 2, 3):
        compiled(torch.randn(TOKENS, 16))
        assert monitor[NAMES[0]].sum() == times * SLOTS
    monitor.reset()
    compiled(torch.randn(TOKENS, 16))
    assert monitor[NAMES[0]].sum() == SLOTS


def test_a_compiled_checkpoint_counts_once():
    model, monitor = mixtral(), LoadMonitor()
    patch(model, loads=monitor)
    router = model.get_submodule(NAMES[0])

    def weigh(hidden):
        return torch.utils.checkpoint.checkpoint(router, hidden, use_reentrant=False)[1].sum()

    torch.compiler.reset()
    hidden = torch.randn(TOKENS, 16, requires_grad=True)
    torch.compile(weigh, backend="aot_eager")(hidden).backward()
    assert monitor[NAMES[0]].sum() == SLOTS


def test_patch_again_leaves_the_monitor_unless_another_comes():
    model, first, second = mixtral(), LoadMonitor(), LoadMonitor()
    patch(model, loads=first)
    patch(model, gate=True)
    model(prompt())
    patch(model, loads=second)
    model(prompt())
    for monitor in (first, second):
        assert totals(monitor) == dict.fromkeys(NAMES, SLOTS)


def test_unpatch_and_the_end_of_a_block_end_counting():
    model, outside, inside = mixtral(), LoadMonitor(), LoadMonitor()
    plain = [dict(vars(module)) for module in model.modules()]
    patch(model, loads=outside)
    with patched(model, loads=inside):
        model(prompt())
    model(prompt())
    unpatch(model)
    model(prompt())
    with patched(model, loads=inside):
        pass
    model(prompt())
    for monitor in (outside, inside):
        assert totals(monitor) == dict.fromkeys(NAMES, SLOTS)
    assert [set(vars(module)) for module in model.modules()] == [set(each) for each in plain]


def test_a_copied_model_counts_into_a_monitor_of_its_own():
    model, monitor = mixtral(), LoadMonitor()
    patch(model, loads=monitor)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 -- its own
        made(prompt())
    assert totals(monitor) == dict.fromkeys(NAMES, 0)


def test_a_model_on_meta_counts_when_it_has_a_device():
    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig(**SIZES, **HEADS))
    monitor = LoadMonitor()
    patch(model, loads=monitor)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            module.inv_freq.fill_(0.1)
    model(prompt())
    assert totals(monitor) == dict.fromkeys(NAMES, SLOTS)


def test_two_models_of_other_sizes_do_not_share_a_layers_counts():
    monitor = LoadMonitor()
    patch(mixtral(), loads=monitor)
    other = MixtralForCausalLM(MixtralConfig(**SIZES, **HEADS, num_local_experts=4))
    with pytest.raises(ValueError, match=r"^num_experts: expected 8, as the counts of 'model.lay"):
        patch(other, loads=monitor)
    assert type(other.get_submodule(NAMES[0])).__module__.startswith("transformers.")


def test_a_router_whose_class_is_made_anew_counts_on(monkeypatch):
    model, monitor = mixtral(), LoadMonitor()
    stock = type(model.get_submodule(NAMES[0]))
    patch(model, loads=monitor)
    own = stock.forward
    same = FunctionType(own.__code__, own.__globals__, own.__name__, own.__defaults__)
    monkeypatch.setattr(stock, "forward", same)
    patch(model)
    model(prompt())
    assert totals(monitor) == dict.fromkeys(NAMES, SLOTS)
    unpatch(model)


def test_a_wrong_monitor_is_named_and_nothing_is_patched():
    model = mixtral()
    with pytest.raises(TypeError, match=r"^loads: expected a moe_routing.LoadMonitor, or None"):
        patch(model, loads={})
    assert type(model.get_submodule(NAMES[0])).__module__.startswith("transformers.")


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("case", HERE, ids=lambda case: case.model)
def test_every_kind_of_router_counts(case, gate):
    torch.manual_seed(0)
    router = AGAINST.built(case, AGAINST.configured(case, dict(case.settings[0]))).eval()
    hidden = torch.randn(AGAINST.T, AGAINST.H)
    arguments = case.arguments(hidden, torch.empty(AGAINST.E).uniform_(-0.3, 0.3))
    holder, monitor = nn.ModuleDict({"router": router}), LoadMonitor()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = patch(holder, gate=gate, loads=monitor)
    assert report.replaced
    with torch.no_grad():
        if case.model == "dbrx":
            router.route_tokens_to_experts(router.router(arguments[0]))
        else:
            router(*arguments)
    (load,) = monitor.read().layers.values()
    assert load.total
    assert load.total % AGAINST.T == 0


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(AGAINST.WHOLE))
def test_every_model_counts_every_layer_that_is_replaced(model_type):
    torch.manual_seed(0)
    sizes = AGAINST.SMALL | AGAINST.WHOLE[model_type]
    model = AutoModelForCausalLM.from_config(AGAINST.CONFIG_MAPPING[model_type](**sizes)).eval()
    monitor = LoadMonitor()
    report = patch(model, loads=monitor)
    with torch.no_grad():
        model(torch.arange(1, 6)[None])
    names = [layer.name for layer in report.replaced]
    assert names
    assert sorted(monitor.counts) == sorted(names)
    assert all(monitor.counts[name].any() for name in names)
