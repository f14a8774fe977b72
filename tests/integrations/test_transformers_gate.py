"""``patch(model, gate=True)``: the logits of transformers' routers, computed by ``Router.gate``.

Routers and models are transformers' own, with random weights.
"""

from __future__ import annotations

import copy
import gc
import json
import pickle
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import accelerate
import peft
import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM

from moe_routing import MoeRoutingWarning
from moe_routing.gating import Gate
from moe_routing.integrations.transformers import patch, patched, unpatch
from moe_routing.integrations.transformers._warnings import warn_once

AGAINST = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("against.py"))))
T, H, E = AGAINST.T, AGAINST.H, AGAINST.E
GATED = "_moe_routing_gate"
OWN = {
    "axk2": "its routing is its own",
    "dbrx": "its block computes them",
    "laguna": "it caps them at 0.7",
    "zaya": "they come from several layers",
}
"""Models whose routers compute their own logits with the first settings of their case."""
IN_FLOAT32 = {"inkling2_text", "inkling2_loop_text"}
"""Models that keep their router's weights in float32, whatever the model's dtype."""
HERE = [case for case in AGAINST.CASES if AGAINST.is_here(case)]
BY_GATE = [pytest.param(case, id=case.model) for case in HERE if case.model not in OWN]
QUICK = ("gemma4_text", "deepseek_v3", "gpt_oss")
WHOLE = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in AGAINST.WHOLE
]
assert len(WHOLE) >= 10
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _all_warnings():
    warn_once.cache_clear()


@pytest.fixture
def gate_calls(monkeypatch):
    """Record the dtypes of logits that calls of ``gate`` ask for; the calls themselves are real."""
    calls, gate = [], Gate.__call__

    def recorded(self, *args, **kwargs):
        calls.append(kwargs["logits_dtype"])
        return gate(self, *args, **kwargs)

    monkeypatch.setattr(Gate, "__call__", recorded)
    return calls


def made(case, dtype=torch.float32, setting=0, **changes):
    """Build a router; return it, its hidden states, and a function that calls it as its block."""
    torch.manual_seed(sum(map(ord, case.model)))
    router = AGAINST.built(case, AGAINST.configured(case, dict(case.settings[setting]) | changes))
    if case.model not in IN_FLOAT32:
        router.to(dtype)
    hidden = torch.randn(T, H, dtype=dtype).requires_grad_()
    arguments = case.arguments(hidden, torch.empty(E).uniform_(-0.3, 0.3))

    def call():
        if case.model == "dbrx":
            return router.route_tokens_to_experts(router.router(arguments[0]))
        return router(*arguments)

    return router, hidden, call


def of(model, dtype=torch.float32, **changes):
    return made(AGAINST.BY_MODEL[model], dtype, **changes)


def built(model_type, **settings):
    """Build a model as loading does, with routers whose logits tell experts apart."""
    torch.manual_seed(sum(map(ord, model_type)))
    sizes = AGAINST.SMALL | AGAINST.WHOLE[model_type] | settings
    model = AutoModelForCausalLM.from_config(AGAINST.CONFIG_MAPPING[model_type](**sizes)).eval()
    for router in routers(model):
        AGAINST.randomize(router, AGAINST.BY_MODEL[model_type].bias)
    return model


def routers(model):
    name = AGAINST.BY_MODEL[model.config.model_type].router.rpartition(".")[2]
    found = [module for module in model.modules() if type(module).__name__ == name]
    assert found
    return found


def prompt(rows=2, tokens=16):
    generator = torch.Generator().manual_seed(7)
    return torch.randint(3, AGAINST.VOCABULARY, (rows, tokens), generator=generator)


def logits(model):
    with torch.no_grad():
        return model(input_ids=prompt(), use_cache=False).logits


def gate_all(model):
    """Patch, and require that every router gates."""
    report = patch(model, gate=True)
    assert report.left == ()
    assert report.gates
    assert [layer.reason for layer in report.gates] == [""] * len(report.layers)
    return report


def assert_close(ours, theirs):
    """Compare outputs whose logits were summed in another order."""
    ours, theirs = AGAINST.in_order_of_ids(ours), AGAINST.in_order_of_ids(theirs)
    assert len(ours) == len(theirs) > 0
    for mine, its in zip(ours, theirs, strict=True):
        if isinstance(its, torch.Tensor):
            torch.testing.assert_close(mine, its, rtol=1e-5, atol=3e-6)
        else:
            assert mine == its


# What comes out


@pytest.mark.parametrize("case", BY_GATE)
@torch.no_grad()
def test_a_gated_router_returns_what_its_own_code_returns(case, gate_calls):
    router, _, call = made(case)
    theirs = call()
    report = gate_all(router)
    assert [layer.backend for layer in report.gates] == ["eager"]
    assert_close(call(), theirs)
    assert gate_calls == [torch.float32]
    unpatch(router)
    AGAINST.assert_same_items(call(), theirs)
    assert len(gate_calls) == 1


@pytest.mark.parametrize("case", BY_GATE)
@torch.no_grad()
def test_logits_have_the_dtype_of_the_routers_own(case, gate_calls):
    router, _, call = made(case, torch.bfloat16)
    theirs = call()
    gate_all(router)
    described = [
        [(x.dtype, x.shape) if isinstance(x, torch.Tensor) else type(x) for x in output]
        for output in (call(), theirs)
    ]
    assert described[0] == described[1]
    assert len(gate_calls) == 1


def distances(own, ours, own_ids, our_ids):
    """Return for each place at which two selections differ how near the two experts were.

    The first of the two experts has the larger logit in the model, the second in ours.
    """
    differ = own_ids != our_ids
    first, second = (ids.clamp(0, E - 1) for ids in (own_ids, our_ids))
    apart = own.gather(1, first) - own.gather(1, second)
    moved = (own - ours).abs().amax(1, keepdim=True).expand_as(apart)
    return differ.any(1).sum().item(), apart[differ].abs(), moved[differ]


BY_LOGITS = [
    name
    for name in ("mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "jamba", "gemma4_text")
    if AGAINST.is_here(AGAINST.BY_MODEL[name])
]
"""Models whose experts are selected by the logits alone."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", BY_LOGITS)
@torch.no_grad()
def test_ids_are_the_models_own_but_where_its_rounding_makes_ties(model, dtype, record_property):
    """Where an id differs, the logits of the two experts are as near as rounding moves them.

    The logits of the two computations differ in how they were rounded, which the second assertion
    bounds: a sum of 64 products of about 0.2 in float32, or the steps in bfloat16 in front of it.
    """
    router, _, _ = of(model, dtype)
    hidden = torch.randn(2048, H).to(dtype)
    projected = []
    if model == "gemma4_text":  # which returns its probabilities
        router.proj.register_forward_hook(lambda *given: projected.append(given[2]))
    own = router(hidden)
    (own_ids,), others = AGAINST.parts(own)[1:]
    own_logits = (projected or others)[0].float()
    if model == "gemma4_text":
        router.proj._forward_hooks.clear()
    seen = []
    gate = Gate.__call__

    def kept(self, *args, **kwargs):
        seen.append(gate(self, *args, **kwargs))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(Gate, "__call__", kept)
        gate_all(router)
        (our_ids,) = AGAINST.parts(router(hidden))[1]
    (ours,) = seen
    rows, apart, moved = distances(own_logits, ours.logits.float(), own_ids, our_ids)
    record_property("rows that differ, of 2048", rows)
    record_property("largest distance", apart.max().item() if rows else 0.0)
    assert (apart <= 2 * moved).all()
    unit = {torch.float32: 2.0**-21, torch.bfloat16: 2.0**-6}[dtype]
    assert (own_logits - ours.logits.float()).abs().max() <= 4 * unit
    assert rows <= (0 if dtype is torch.float32 else 2048 * 0.05)


@pytest.mark.parametrize("model_type", WHOLE)
@torch.no_grad()
def test_a_gated_model_generates_the_same_tokens(model_type, gate_calls):
    model = built(model_type)

    def greedy():
        return model.generate(
            prompt(), max_new_tokens=32, min_new_tokens=32, do_sample=False, pad_token_id=0
        )

    theirs = greedy()
    gate_all(model)
    assert torch.equal(greedy(), theirs)
    assert len(gate_calls) == 32 * len(routers(model))
    assert len(theirs.unique()) > 10


# Training


@pytest.mark.parametrize("case", BY_GATE)
def test_gradients_are_those_of_its_own_code_within_rounding(case, gate_calls):
    router, hidden, call = made(case)
    router.requires_grad_()
    leaves = [hidden, *(p for p in router.parameters() if p.is_floating_point())]

    def gradients():
        items = AGAINST.in_order_of_ids(call())
        floats = [item for item in items if isinstance(item, torch.Tensor) and item.requires_grad]
        torch.manual_seed(0)
        loss = sum((item.float() * torch.randn(item.shape)).sum() for item in floats)
        return torch.autograd.grad(loss, leaves, allow_unused=True)

    theirs = gradients()
    assert any(its is not None and its.any() for its in theirs)
    gate_all(router)
    for mine, its in zip(gradients(), theirs, strict=True):
        assert mine is not None or its is None or not its.any()
        if its is not None:
            torch.testing.assert_close(mine, its, rtol=1e-4, atol=3e-5)
    assert gate_calls == ([] if case.model == "phimoe" and router.training else [torch.float32])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("model_type", QUICK)
def test_a_gated_model_trains_as_it_does_alone(model_type, checkpointing):
    def losses(*, ours):
        model = built(model_type).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        if ours:
            gate_all(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        found = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(input_ids=prompt(), labels=prompt(), use_cache=False).loss
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
        return torch.stack(found)

    theirs = losses(ours=False)
    assert theirs[2] < theirs[0]
    torch.testing.assert_close(losses(ours=True), theirs, rtol=1e-4, atol=1e-5)


def test_router_logits_are_recorded_and_the_auxiliary_loss_is_kept():
    model = built("mixtral", router_aux_loss_coef=1.0).train()

    def passed():
        model.zero_grad()
        output = model(
            input_ids=prompt(), labels=prompt(), output_router_logits=True, use_cache=False
        )
        output.loss.backward()
        return output.aux_loss.detach(), output.router_logits, routers(model)[0].weight.grad.clone()

    theirs = passed()
    gate_all(model)
    ours = passed()
    assert len(ours[1]) == 2
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=3e-6)


# Nothing goes stale


def stepped(router):
    for parameter in router.parameters():
        parameter.grad = parameter.detach().flip(0)
    torch.optim.SGD(router.parameters(), lr=0.05).step()


CHANGES = {
    "load_state_dict": lambda router: router.load_state_dict(
        {name: t.flip(0) * 0.5 for name, t in router.state_dict().items()}
    ),
    "data.copy_": lambda router: [p.data.copy_(p.data.flip(0)) for p in router.parameters()],
    "data": lambda router: [setattr(p, "data", p.data.flip(0)) for p in router.parameters()],
    "a new parameter": lambda router: [
        setattr(owner, name, nn.Parameter(p.detach().flip(0)))
        for owner in router.modules()
        for name, p in list(owner.named_parameters(recurse=False))
    ],
    "a step of training": stepped,
}


COMPILED = [
    pytest.param(
        model, change, marks=() if change == "data" and model == "gpt_oss" else pytest.mark.slow
    )
    for model in QUICK
    for change in CHANGES
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("model", QUICK)
def test_changed_parameters_count_at_the_next_call(model, change):
    assert_followed(model, change, compiled=False)


@pytest.mark.parametrize(("model", "change"), COMPILED)
def test_changed_parameters_count_at_the_next_compiled_call(model, change):
    assert_followed(model, change, compiled=True)


@torch.no_grad()
def assert_followed(model, change, *, compiled):
    router, hidden, _ = of(model)
    gate_all(router)
    torch.compiler.reset()
    call = torch.compile(router, fullgraph=True, backend="eager") if compiled else router
    before = call(hidden)[2]
    CHANGES[change](router)
    ours = call(hidden)
    unpatch(router)
    assert_close(ours, router(hidden))
    assert not torch.equal(ours[2], before)
    torch.compiler.reset()


LORA = {
    "qwen3_moe": {"target_parameters": ["mlp.gate.weight"], "target_modules": ["q_proj"]},
    "gemma4_text": {"target_modules": r".*router\.proj"},
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
@pytest.mark.parametrize("model_type", LORA)
def test_adapters_count_and_gate_goes_on_when_they_are_merged(model_type, gate_calls):
    def results(*, ours):
        model = built(model_type)
        if ours:
            gate_all(model)
        config = peft.LoraConfig(r=4, init_lora_weights=False, **LORA[model_type])
        model = peft.get_peft_model(model, config)
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(0.0, 0.1)
        adapted = adapted_logits(model, wraps=ours and model_type == "gemma4_text")
        model(input_ids=prompt(), labels=prompt(), use_cache=False).loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        merged = model.merge_and_unload()
        if ours:
            gate_all(merged)
        gate_calls.clear()
        after = logits(merged)
        assert len(gate_calls) == (2 if ours else 0)
        return adapted, gradients, after

    ours, theirs = results(ours=True), results(ours=False)
    assert any("lora" in name for name in theirs[1])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def adapted_logits(model, *, wraps):
    """Return the logits; an adapter around the linear layer is named, by the call and by patch."""
    if not wraps:
        return logits(model)
    with pytest.warns(
        MoeRoutingWarning, match=r"own logits: its proj is a peft\..*\.Linear, whose"
    ):
        adapted = logits(model)
    with pytest.warns(MoeRoutingWarning, match=r"\[left\].*its proj is a peft\..*\.Linear, whose"):
        assert not any(layer.gated for layer in patch(model, gate=True).gates)
    return adapted


# What keeps its own logits


@pytest.mark.parametrize("model", OWN)
@torch.no_grad()
def test_a_router_that_does_more_keeps_its_own_logits_with_the_reason(model, gate_calls):
    setting = 1 if model == "axk2" else 0
    router, _, call = made(AGAINST.BY_MODEL[model], setting=setting)
    theirs = call()
    with pytest.warns(MoeRoutingWarning, match=OWN[model]):
        report = patch(router, gate=True)
    assert [(layer.gated, layer.backend) for layer in report.gates] == [(False, "")]
    AGAINST.assert_same_items(AGAINST.in_order_of_ids(call()), AGAINST.in_order_of_ids(theirs))
    assert gate_calls == []


@torch.no_grad()
def test_a_cap_that_is_set_or_removed_after_patch_is_followed(gate_calls):
    router, hidden, _ = of("laguna", moe_router_logit_softcapping=0.0)
    gate_all(router)
    router(hidden)
    router.router_logit_softcapping = 2.0
    with pytest.warns(MoeRoutingWarning, match="LagunaTopKRouter computes its own .* caps .* 2.0"):
        ours = router(hidden)
    assert len(gate_calls) == 1
    unpatch(router)
    assert_close(ours, router(hidden))


class Scaled(nn.Linear):
    def forward(self, hidden):
        return super().forward(hidden * 0.5)


def of_another_class(layer):
    layer.__class__ = Scaled


def with_another_forward(layer):
    inner = layer.forward
    layer.forward = lambda hidden: inner(hidden * 0.5)


def with_a_hook(layer):
    layer.register_forward_pre_hook(lambda _layer, given: (given[0] * 0.5,))


INSIDE = {
    "class": (of_another_class, r"is a .*\.Scaled, whose code is not known"),
    "forward": (with_another_forward, r"the forward of its \w+ was replaced, by .*<lambda>"),
    "hook": (with_a_hook, "has hooks"),
}
LAYERS = {
    "gemma4_text": ("proj", "norm"),
    "afmoe": ("gate",),
    "hunyuan_v1_moe": ("wg",),
    "jetmoe": ("layer",),
}
CHANGED = [
    (model, name, change)
    for model, names in LAYERS.items()
    for name in names
    for change in INSIDE
    if AGAINST.is_here(AGAINST.BY_MODEL[model]) and (name, change) != ("norm", "class")
]


@pytest.mark.parametrize("first", ["change", "patch"])
@pytest.mark.parametrize(("model", "name", "change"), CHANGED)
@torch.no_grad()
def test_what_was_done_to_a_routers_layer_stays_in_force(model, name, change, first, gate_calls):
    router, _, call = of(model)
    plain = call()
    set_, reason = INSIDE[change]
    if first == "change":
        set_(getattr(router, name))
        with pytest.warns(MoeRoutingWarning, match=f"its own logits: .*{reason}"):
            assert not patch(router, gate=True).gates[0].gated
        ours = call()
    else:
        gate_all(router)
        set_(getattr(router, name))
        with pytest.warns(MoeRoutingWarning, match=f"computes its own logits: .*{reason}"):
            ours = call()
        call()  # which says it no more
    assert gate_calls == []
    unpatch(router)
    theirs = call()
    AGAINST.assert_same_items(AGAINST.in_order_of_ids(ours), AGAINST.in_order_of_ids(theirs))
    if name != "norm":  # after which a half makes no difference
        pairs = zip(theirs, plain, strict=True)
        assert any(not torch.equal(*pair) for pair in pairs if isinstance(pair[0], torch.Tensor))


@torch.no_grad()
def test_a_linear_layer_whose_class_was_changed_is_followed(monkeypatch, gate_calls):
    router, hidden, _ = of("gemma4_text")
    gate_all(router)
    inner = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: inner(self, x * 0.5))
    with pytest.warns(MoeRoutingWarning, match=r"the forward of its proj was replaced, by .*gate"):
        ours = router(hidden)
    unpatch(router)
    AGAINST.assert_same_items(ours[1:], router(hidden)[1:])
    assert gate_calls == []


@torch.no_grad()
def test_hooks_of_all_modules_see_the_routers_layers(gate_calls):
    router, hidden, _ = of("gemma4_text")
    gate_all(router)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.append(type(module).__name__)
    )
    try:
        with pytest.warns(MoeRoutingWarning, match="its norm has hooks"):
            router(hidden)
    finally:
        handle.remove()
    assert seen == ["Gemma4RMSNorm", "Linear", "Gemma4TextRouter"]
    router(hidden)
    assert len(gate_calls) == 1


@torch.no_grad()
def test_hooks_of_the_router_itself_see_what_it_takes_and_returns(gate_calls):
    router, hidden, _ = of("mixtral")
    theirs = router(hidden * 0.5)
    gate_all(router)
    seen = []
    router.register_forward_pre_hook(lambda _router, given: (given[0] * 0.5,))
    router.register_forward_hook(lambda _router, _given, output: seen.append(output))
    router(hidden)
    assert len(gate_calls) == 1
    assert_close(seen[0], theirs)


class Quantized(torch.Tensor):
    """A weight that is not what its memory says: its linear layer multiplies by twice of it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        output = super().__torch_function__(func, types, args, kwargs)
        return output.as_subclass(torch.Tensor) * 2 if func is nn.functional.linear else output


@torch.no_grad()
def test_a_weight_of_another_class_is_left_to_the_routers_own_linear_layer(gate_calls):
    router, hidden, _ = of("mixtral")
    plain = router(hidden)
    router.weight = nn.Parameter(router.weight.detach().as_subclass(Quantized))
    theirs = router(hidden)
    with pytest.warns(MoeRoutingWarning, match=r"its weight is a .*\.Quantized, no plain tensor"):
        patch(router, gate=True)
    AGAINST.assert_same_items(router(hidden), theirs)
    assert not torch.equal(theirs[0], plain[0])
    assert gate_calls == []


@torch.no_grad()
def test_a_router_whose_weight_is_no_parameter_is_gated_and_its_device_is_not_known():
    router, hidden, _ = of("mixtral")
    theirs = router(hidden)
    weight = router.weight.detach()
    del router.weight
    router.weight = weight
    report = gate_all(router)
    assert [report.layers[0].backend, report.gates[0].backend] == ["", ""]
    assert_close(router(hidden), theirs)


@torch.no_grad()
def test_weights_of_float64_and_sizes_past_those_of_gate_are_left():
    router, hidden, _ = of("mixtral")
    theirs = router.double()(hidden.double())
    with pytest.warns(
        MoeRoutingWarning, match="its weight is float64; gate takes bfloat16, float16 or float32"
    ):
        patch(router, gate=True)
    AGAINST.assert_same_items(router(hidden.double()), theirs)
    router, _, _ = of("mixtral")
    router.weight.data = torch.randn(2, 16385)
    router.top_k = 1
    with pytest.warns(
        MoeRoutingWarning, match=r"the shape \[2, 16385\]; gate takes up to 1024 exp"
    ):
        patch(router, gate=True)
    assert router(torch.randn(3, 16385))[2].shape == (3, 1)


@pytest.mark.parametrize("model", ["mixtral", "deepseek_v3", "gemma4_text", "ernie4_5_moe"])
def test_autocast_is_left_to_the_routers_own_operations(model, gate_calls):
    router, hidden, call = of(model)
    with torch.autocast("cpu", torch.bfloat16):
        patch(router)
        theirs = call()
        gate_all(router)
        with pytest.warns(MoeRoutingWarning, match="computes its own logits: autocast is on"):
            ours = call()
    AGAINST.assert_same_items(ours, theirs)
    assert gate_calls == []
    router(hidden)
    assert len(gate_calls) == 1


def test_transforms_of_torch_func_are_left_to_the_routers_own_operations(gate_calls):
    router, hidden, _ = of("qwen3_moe")
    parameters = dict(router.named_parameters())
    hidden = hidden.detach()

    def loss(parameters):
        first, weights, _ = torch.func.functional_call(router, parameters, (hidden,))
        return first.square().sum() + weights.square().sum()

    def along():
        with torch.autograd.forward_ad.dual_level():
            given = torch.autograd.forward_ad.make_dual(hidden, torch.ones_like(hidden))
            return torch.autograd.forward_ad.unpack_dual(router(given)[1]).tangent

    theirs = torch.func.grad(loss)(parameters), along()
    gate_all(router)
    with pytest.warns(MoeRoutingWarning, match=r"own logits: torch\.func or forward-mode autograd"):
        ours = torch.func.grad(loss)(parameters), along()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert gate_calls == []


def test_hidden_states_of_another_dtype_fail_as_in_the_routers_own_linear_layer():
    router, hidden, _ = of("mixtral", torch.bfloat16)
    gate_all(router)
    with (
        pytest.warns(MoeRoutingWarning, match="hidden states are float32, its weight is bfloat16"),
        pytest.raises(RuntimeError, match="dtype"),
    ):
        router(hidden.float())


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model", ["deepseek_v3", "minimax_m2"])
@torch.no_grad()
def test_a_router_that_casts_takes_any_two_dtypes(model, hidden, weight, gate_calls):
    router, _, _ = of(model)
    router.weight.data = router.weight.data.to(weight)
    given = torch.randn(T, H).to(hidden)
    bias = () if model == "deepseek_v3" else (torch.zeros(E),)
    theirs = router(given, *bias)
    gate_all(router)
    ours = router(given, *bias)
    assert gate_calls == [torch.float32 if model == "deepseek_v3" else weight]
    assert ours[0].dtype == theirs[0].dtype
    unit = torch.finfo(theirs[0].dtype).eps
    torch.testing.assert_close(ours[0], theirs[0], rtol=2 * unit, atol=16 * 2.0**-24)


def test_training_of_phimoe_keeps_its_own_code(gate_calls):
    router, _, call = of("phimoe")
    gate_all(router)
    router.train()
    call()
    assert gate_calls == []
    router.eval()
    call()
    assert len(gate_calls) == 1


@pytest.mark.filterwarnings("ignore::UserWarning:accelerate")
@pytest.mark.parametrize("model_type", ["mixtral", "gemma4_text"])
def test_offloaded_routers(model_type, tmp_path, gate_calls):
    """accelerate hooks every module that holds a weight: a router itself, or a layer of it."""
    theirs = logits(built(model_type))
    model = accelerate.disk_offload(built(model_type), tmp_path, execution_device="cpu")
    if model_type == "mixtral":
        assert [layer.backend for layer in gate_all(model).gates] == ["eager"] * 2
    else:
        with pytest.warns(MoeRoutingWarning, match=r"its \w+ was replaced, by accelerate\.hooks"):
            patch(model, gate=True)
    torch.testing.assert_close(logits(model), theirs, rtol=1e-4, atol=1e-5)
    assert len(gate_calls) == (2 if model_type == "mixtral" else 0)


# patch, unpatch, copies, the report


@pytest.mark.parametrize("model_type", AGAINST.WHOLE)
def test_unpatch_leaves_no_trace(model_type):
    model = built(model_type)
    before = {name: (type(module), dict(vars(module))) for name, module in model.named_modules()}
    gate_all(model)
    assert all(GATED in vars(router) for router in routers(model))
    unpatch(model)
    after = {name: (type(module), dict(vars(module))) for name, module in model.named_modules()}
    assert after == before


def test_patch_without_gate_leaves_it_and_a_block_ends_where_it_began(gate_calls):
    model = built("gemma4_text")
    patch(model)
    logits(model)
    assert gate_calls == []
    with patched(model, gate=True) as report:
        assert [layer.gated for layer in report.gates] == [True, True]
        logits(model)
        assert len(gate_calls) == 2
    logits(model)
    assert len(gate_calls) == 2
    assert not any(GATED in vars(module) for module in model.modules())
    gate_all(model)
    assert patch(model).gates == ()
    with patched(model, gate=True):
        pass
    logits(model)
    assert len(gate_calls) == 4


def test_gate_and_experts_together(gate_calls):
    model = built("qwen3_moe")
    theirs = logits(model)
    report = patch(model, experts=True, gate=True)
    assert [layer.gated for layer in report.gates] == [True, True]
    assert [layer.selected for layer in report.experts] == [True, True]
    torch.testing.assert_close(logits(model), theirs, rtol=1e-4, atol=1e-5)
    assert len(gate_calls) == 2
    unpatch(model)
    assert torch.equal(logits(model), theirs)
    assert len(gate_calls) == 2


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),  # noqa: S301 -- its own
}


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_gates_by_its_own_parameters(way, gate_calls):
    model = built("gemma4_text")
    gate_all(model)
    theirs = logits(model)
    copied = COPIES[way](model)
    gate_calls.clear()
    assert torch.equal(logits(copied), theirs)
    assert len(gate_calls) == 2
    for router in routers(copied):
        router.scale.data.neg_()
    assert not torch.equal(logits(copied), theirs)
    assert torch.equal(logits(model), theirs)
    unpatch(copied)
    gc.collect()
    assert torch.equal(logits(model), theirs)


def test_the_report_has_a_line_for_the_gates():
    model = built("mixtral")
    gate = routers(model)[1]
    gate.weight.data = gate.weight.data.double()
    with pytest.warns(MoeRoutingWarning) as warned:
        report = patch(model, gate=True)
    reason = "its weight is float64; gate takes bfloat16, float16 or float32"
    assert str(report).splitlines()[2:] == [
        "1 of 2 routers' logits computed by gate",
        "[replaced] model.layers.0.mlp.gate (mixtral.MixtralTopKRouter): gate by eager",
        f"[left] model.layers.1.mlp.gate (mixtral.MixtralTopKRouter): its own logits: {reason}",
    ]
    assert [str(w.message).splitlines()[-1] for w in warned] == [str(report).splitlines()[-1]]
    said = report.to_dict()
    assert json.loads(json.dumps(said)) == said
    assert said["gates"][0] == {
        "name": "model.layers.0.mlp.gate",
        "router": "mixtral.MixtralTopKRouter",
        "backend": "eager",
        "reason": "",
        "gated": True,
    }
    console = Console(width=120, record=True, file=sys.stderr)
    console.print(report)
    assert "logits: gate" in console.export_text()


@pytest.mark.parametrize("switch", ["gate", "experts"])
def test_a_switch_is_a_bool(switch):
    with pytest.raises(TypeError, match=f"^{switch}: expected True or False, got 'yes'"):
        patch(nn.Linear(1, 1), **{switch: "yes"})


# Tracing


GRAPHS = ("mixtral", "deepseek_v3", "gemma4_text", "gpt_oss", "afmoe", "laguna")


@pytest.mark.parametrize(
    "model", [name for name in GRAPHS if AGAINST.is_here(AGAINST.BY_MODEL[name])]
)
@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_router_is_one_graph_and_follows_patch_and_unpatch(model):
    changes = {"moe_router_logit_softcapping": 0.0} if model == "laguna" else {}
    router, _, call = of(model, **changes)
    theirs = call()
    operators = []

    def backend(graph, _inputs):
        names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        operators.append([name for name in names if "moe_routing" in name or "autocast" in name])
        return graph.forward

    torch.compiler.reset()
    router.compile(fullgraph=True, backend=backend)
    patch(router)
    assert_close(call(), theirs)
    gate_all(router)
    assert_close(call(), theirs)
    unpatch(router)
    assert_close(call(), theirs)
    assert operators == [["moe_routing.route"], ["moe_routing.gate"], []]
    torch.compiler.reset()


@torch.no_grad()
def test_an_exported_router_holds_one_gate():
    router, hidden, _ = of("gemma4_text")
    gate_all(router)
    exported = torch.export.export(router, (hidden.detach(),))
    called = [str(node.target) for node in exported.graph.nodes]
    assert called.count("moe_routing.gate.default") == 1
    assert_close(exported.module()(hidden)[1:], router(hidden)[1:])
