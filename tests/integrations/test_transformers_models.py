"""Whole tiny models of transformers with random weights.

They run before and after ``patch``, and loaded under ``enable``.
"""

from __future__ import annotations

import copy
import importlib.util
import runpy
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM, monkey_patching
from transformers.monkey_patching import apply_patches, get_patch_mapping

from moe_routing import MoeRoutingWarning
from moe_routing.integrations.transformers import disable, enable, patch, patched, unpatch

AGAINST = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("against.py"))))
EXPERTS = ("eager", "grouped_mm", "batched_mm")
TWO = ("gemma4_text", "deepseek_v3")
CASES = [
    pytest.param(
        model, experts, marks=() if model in TWO and experts == "grouped_mm" else pytest.mark.slow
    )
    for model in AGAINST.WHOLE
    for experts in EXPERTS
    if model != "llama4_text" or experts == "eager"
]
MADE = "moe_routing.integrations.transformers.routers"
FEW = ("gemma4_text", "deepseek_v3", "qwen3_moe", "gpt_oss")
pytestmark = pytest.mark.usefixtures("one_thread")


MAPPING_WORKS = importlib.util.find_spec("torchvision") is not None or Version(
    transformers.__version__
) >= Version("5.21")
"""Up to 5.20 transformers' patch mapping cannot be used without torchvision.

`make transformers-check` deselects its tests.
"""


@pytest.fixture
def _enabled():
    enable()
    yield
    disable()


def test_enable_says_where_transformers_mapping_cannot_be_used_and_leaves_nothing_behind(
    monkeypatch,
):
    if MAPPING_WORKS:  # elsewhere transformers itself raises this, in `make transformers-check`
        error = ModuleNotFoundError("No module named 'torchvision'")
        monkeypatch.setattr(monkey_patching, "apply_patches", Mock(side_effect=error))
    with pytest.raises(RuntimeError, match=r"No module named 'torchvision'.*patch\(model\)"):
        enable()
    assert get_patch_mapping() == {}


def built(model_type, experts="eager", **settings):
    """Build a model as loading does, with routers whose logits tell experts apart."""
    torch.manual_seed(sum(map(ord, model_type)))
    config = AGAINST.CONFIG_MAPPING[model_type](
        **AGAINST.SMALL | AGAINST.WHOLE[model_type] | settings
    )
    said = {} if model_type == "llama4_text" else {"experts_implementation": experts}
    model = AutoModelForCausalLM.from_config(config, **said).eval()
    for router in routers(model):
        AGAINST.randomize(router, AGAINST.BY_MODEL[model_type].bias)
    return model


def routers(model):
    """Return the routers of a model, of which there is at least one."""
    name = AGAINST.BY_MODEL[model.config.model_type].router.rpartition(".")[2]
    found = [module for module in model.modules() if type(module).__name__ == name]
    assert found, f"{type(model).__name__} has no {name}"
    return found


def is_patched(model):
    """Whether all of a model's routers route through us.

    A model whose routers differ is an error.
    """
    (patched_or_not,) = {type(router).__module__ == MADE for router in routers(model)}
    return patched_or_not


def prompt(rows=2):
    return torch.randint(
        3, AGAINST.VOCABULARY, (rows, 16), generator=torch.Generator().manual_seed(7)
    )


def greedy(model, **said):
    return model.generate(
        prompt(), max_new_tokens=32, min_new_tokens=32, do_sample=False, pad_token_id=0, **said
    )


@pytest.mark.parametrize(("model_type", "experts"), CASES)
@torch.no_grad()
def test_patched_model_generates_the_same_tokens(model_type, experts):
    model = built(model_type, experts)
    theirs = greedy(model)
    report = patch(model)
    assert len(report.replaced) == len(routers(model)) == 2
    assert report.left == ()
    assert torch.equal(greedy(model), theirs)
    assert len(theirs.unique()) > 10


@pytest.mark.parametrize(("model_type", "experts"), CASES)
@torch.no_grad()
def test_patched_layers_route_the_same_input_the_same_way(model_type, experts):
    model = built(model_type, experts)
    calls = []
    hooks = [
        r.register_forward_hook(lambda module, args, output: calls.append((module, args, output)))
        for r in routers(model)
    ]
    model(input_ids=prompt())
    for hook in hooks:
        hook.remove()
    patch(model)
    assert len(calls) == 2
    for router, args, output in calls:
        AGAINST.assert_same_items(
            AGAINST.in_order_of_ids(router(*args)), AGAINST.in_order_of_ids(output)
        )


@pytest.mark.parametrize("model_type", AGAINST.WHOLE)
def test_unpatch_leaves_no_trace(model_type):
    model = built(model_type)
    before = {name: (type(module), dict(vars(module))) for name, module in model.named_modules()}
    state = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    patch(model)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == state
    assert [name for name, _ in model.named_modules()] == list(before)
    assert is_patched(model)
    unpatch(model)
    after = {name: (type(module), dict(vars(module))) for name, module in model.named_modules()}
    assert after == before


def test_patching_twice_changes_nothing_and_a_block_ends_where_it_began():
    model = built("gemma4_text")
    with patched(model) as report:
        classes = [type(router) for router in routers(model)]
        assert patch(model) == report
        with patched(model):
            pass
        assert [type(router) for router in routers(model)] == classes
    assert not is_patched(model)


def test_a_block_ends_where_it_began_after_an_error_too():
    model = built("gemma4_text")
    with pytest.raises(ZeroDivisionError), patched(model):
        raise ZeroDivisionError
    assert not is_patched(model)


@pytest.mark.parametrize("model_type", FEW)
@torch.no_grad()
def test_patched_model_generates_the_same_tokens_with_a_static_cache(model_type):
    model = built(model_type, "batched_mm")
    theirs = greedy(model, cache_implementation="static", disable_compile=True)
    with patched(model):
        assert torch.equal(
            greedy(model, cache_implementation="static", disable_compile=True), theirs
        )


@pytest.mark.slow
@torch.no_grad()
def test_patched_model_compiles_as_one_graph_and_both_ways_are_noticed():
    model = built("gemma4_text", "batched_mm")
    operators = []

    def backend(graph, _inputs):
        operators.append(sum("moe_routing" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    theirs = compiled(input_ids=prompt(), use_cache=False).logits
    patch(compiled)
    torch.testing.assert_close(
        compiled(input_ids=prompt(), use_cache=False).logits, theirs, rtol=1e-4, atol=1e-5
    )
    assert operators == [0, 2]
    unpatch(compiled)
    assert torch.equal(compiled(input_ids=prompt(), use_cache=False).logits, theirs)
    torch.compiler.reset()


@pytest.mark.parametrize("model_type", FEW)
def test_gradients_of_a_patched_model_are_its_own(model_type):
    model = built(model_type, "grouped_mm").train()

    def gradients():
        model.zero_grad()
        model(input_ids=prompt(), labels=prompt(), use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    theirs = gradients()
    assert any("router" in name or "gate.weight" in name for name in theirs)
    patch(model)
    ours = gradients()
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-6)


def test_the_auxiliary_loss_and_its_gradients_are_kept():
    model = built("mixtral", router_aux_loss_coef=1.0).train()

    def losses():
        model.zero_grad()
        output = model(
            input_ids=prompt(), labels=prompt(), output_router_logits=True, use_cache=False
        )
        output.loss.backward()
        return output.aux_loss.detach(), output.router_logits, routers(model)[0].weight.grad.clone()

    theirs = losses()
    patch(model)
    ours = losses()
    assert len(ours[1]) == 2
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_gemmas_probabilities_are_there_for_whoever_looks():
    router = routers(built("gemma4_text"))[0]
    hidden = torch.randn(5, AGAINST.H)
    theirs = router(hidden)[0]
    patch(router)
    probabilities = router(hidden)[0]
    assert isinstance(probabilities, torch.Tensor)
    assert (probabilities.shape, probabilities.dtype, probabilities.device) == (
        theirs.shape,
        theirs.dtype,
        theirs.device,
    )
    assert torch.equal(probabilities, theirs)
    assert probabilities.tolist() == theirs.tolist()
    assert torch.equal(torch.cat([probabilities, theirs])[:5], theirs)
    seen = []
    router.register_forward_hook(lambda _module, _args, output: seen.append(output[0]))
    router(hidden)
    assert type(seen[0]) is torch.Tensor


@pytest.mark.slow
@pytest.mark.patch_mapping
@pytest.mark.usefixtures("_enabled")
@pytest.mark.parametrize("model_type", TWO)
@torch.no_grad()
def test_enabled_loading_routes_and_generates_the_same_tokens(model_type):
    disable()
    theirs = greedy(built(model_type))
    enable()
    model = built(model_type)
    assert is_patched(model)
    assert torch.equal(greedy(model), theirs)
    assert patch(model).left == ()
    unpatch(model)
    assert torch.equal(greedy(model), theirs)


@pytest.mark.slow
@pytest.mark.patch_mapping
@pytest.mark.usefixtures("_enabled")
def test_enabled_loading_keeps_checkpoints_and_their_names(tmp_path):
    disable()
    built("qwen3_moe").save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    enable()
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(isinstance(router, type(routers(stock)[0])) for router in routers(model))
    assert model.state_dict().keys() == stock.state_dict().keys()
    assert torch.equal(
        model(input_ids=prompt()).logits,
        AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids=prompt()).logits,
    )
    torch.testing.assert_close(model(input_ids=prompt()).logits, stock(input_ids=prompt()).logits)


@pytest.mark.slow
@pytest.mark.patch_mapping
@pytest.mark.usefixtures("_enabled")
@torch.no_grad()
def test_router_logits_are_recorded_with_and_without_our_routing_once_enabled():
    model = built("qwen3_moe")
    assert len(model(input_ids=prompt(), output_router_logits=True).router_logits) == 2
    stock = type(model)(
        copy.deepcopy(model.config)
    ).eval()  # the class itself: not through transformers' mapping
    assert not is_patched(stock)
    assert len(stock(input_ids=prompt(), output_router_logits=True).router_logits) == 2
    disable()
    assert len(built("qwen3_moe")(input_ids=prompt(), output_router_logits=True).router_logits) == 2


@pytest.mark.slow
@pytest.mark.patch_mapping
@pytest.mark.usefixtures("_enabled")
@torch.no_grad()
def test_disabled_loading_is_transformers_own_and_enabling_twice_is_enabling_once():
    enable()
    disable()
    disable()
    assert not is_patched(built("qwen3_moe"))


@pytest.mark.slow
@pytest.mark.patch_mapping
@pytest.mark.usefixtures("_enabled")
def test_enable_says_which_router_it_leaves():
    axk2 = (
        AGAINST.SMALL
        | AGAINST.LATENT
        | {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2}
    )
    config = AGAINST.CONFIG_MAPPING["axk2"](
        **axk2 | {"num_key_value_heads": 4, "first_k_dense_replace": 1}
    )
    with pytest.warns(
        MoeRoutingWarning, match=r"AXK2TopkRouter keeps its own routing: .* outside the kept groups"
    ):
        model = AutoModelForCausalLM.from_config(config)
    assert any("AXK2TopkRouter" in type(module).__name__ for module in model.modules())
    assert not any(type(module).__module__ == MADE for module in model.modules())


@pytest.mark.slow
@pytest.mark.patch_mapping
@pytest.mark.usefixtures("_enabled")
def test_enable_does_not_mistake_a_checkpoints_own_class_for_transformers(monkeypatch):
    code = "class Qwen3MoeTopKRouter:\n    pass\ndef load():\n    return Qwen3MoeTopKRouter()\n"
    remote = types.ModuleType("transformers_modules.somebody.modeling")
    exec(code, vars(remote))  # noqa: S102 -- what transformers does with a checkpoint's code
    monkeypatch.setitem(sys.modules, remote.__name__, remote)

    own = r"transformers_modules.somebody.modeling has a class Qwen3MoeTopKRouter of its own"
    with apply_patches(), pytest.raises(RuntimeError, match=own):
        remote.load()
    assert type(remote.load()).__module__ == remote.__name__


@pytest.mark.slow
@pytest.mark.patch_mapping
@pytest.mark.usefixtures("_enabled")
def test_disable_puts_back_what_transformers_leaves_behind_when_loading_fails(monkeypatch):
    cls = type(routers(built("qwen3_moe"))[0]).__mro__[1]

    def fail(*_args):
        raise ZeroDivisionError

    with monkeypatch.context() as patches:
        patches.setattr(cls, "__init__", fail)
        with pytest.raises(ZeroDivisionError):
            built("qwen3_moe")
    disable()
    assert getattr(sys.modules[cls.__module__], cls.__name__) is cls
    assert not is_patched(built("qwen3_moe"))


@torch.no_grad()
def test_a_copy_of_a_patched_model_routes_by_its_own_parameters():
    model = built("qwen3_moe")
    patch(model)
    copied = copy.deepcopy(model)
    for router in routers(copied):
        router.weight.zero_()
    assert not torch.equal(copied(input_ids=prompt()).logits, model(input_ids=prompt()).logits)
