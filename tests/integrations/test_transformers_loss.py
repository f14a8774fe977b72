"""``patch(model, loss=True)``: transformers' load balancing loss, computed by ours.

Models are transformers' own, with random weights.
"""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import runpy
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import accelerate
import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.mixtral import modeling_mixtral

from moe_routing import MoeRoutingWarning
from moe_routing.integrations.transformers import _balance, losses, patch, patched, unpatch

AGAINST = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("against.py"))))
FINGERPRINTS = runpy.run_path(str(Path(__file__).with_name("fingerprints.py")))
THEIRS = modeling_mixtral.load_balancing_loss_func
E, B, S = 8, 2, 16
FURTHER = {"jamba": {"num_experts": E, "num_experts_per_tok": 2, "use_mamba_kernels": False}}
"""Sizes of models with this loss that the shared list does not have."""
MODELS = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "gpt_oss",
    "phimoe",
    "granitemoe",
    "ernie4_5_moe",
    "minimax_m2",
    "jamba",
)
QUICK = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
EVERY = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in MODELS]
MASKS = {
    "no mask": None,
    "all": torch.ones(B, S, dtype=torch.long),
    "left": (torch.arange(S) >= torch.tensor([[0], [5]])).long(),
    "right": (torch.arange(S) < torch.tensor([[S], [3]])).long(),
}
pytestmark = pytest.mark.usefixtures("one_thread")


def built(model_type="mixtral", **settings):
    torch.manual_seed(sum(map(ord, model_type)))
    sizes = AGAINST.SMALL | (FURTHER | AGAINST.WHOLE)[model_type] | settings
    sizes["output_router_logits"] = True
    return AutoModelForCausalLM.from_config(AGAINST.CONFIG_MAPPING[model_type](**sizes))


def prompt():
    generator = torch.Generator().manual_seed(7)
    return torch.randint(3, AGAINST.VOCABULARY, (B, S), generator=generator)


def stepped(model, mask=None):
    """Return both losses and the gradients of a training step."""
    model.zero_grad()
    torch.manual_seed(1)  # for routers that sample in training
    out = model(input_ids=prompt(), attention_mask=mask, labels=prompt(), use_cache=False)
    out.loss.backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    assert gradients
    return out.loss.detach(), out.aux_loss.detach(), gradients


def assert_same_step(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.fixture
def calls(monkeypatch):
    """Count the layers that our loss is given; the calls themselves are real."""
    found, sums = [], _balance._sums

    def counted(layers, *args):
        found.extend(layers)
        return sums(layers, *args)

    monkeypatch.setattr(_balance, "_sums", counted)
    return found


def replaced(model):
    """Patch, and require that the loss is replaced."""
    report = patch(model, loss=True)
    assert [loss.reason for loss in report.losses] == [""]
    return report


# The function


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("topk", [1, 2, 5, E])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_value_and_gradients_are_theirs(mask, layers, topk, dtype):
    ours = [torch.randn(B * S, E).to(dtype).requires_grad_() for _ in range(layers)]
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    found = _balance.load_balancing_loss(tuple(ours), E, topk, mask)
    expected = THEIRS(tuple(theirs), E, topk, mask)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    found.backward()
    expected.backward()
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, its.grad)


def test_a_token_counts_as_much_as_the_mask_says():
    mask = torch.randint(0, 4, (B, S))
    logits = (torch.randn(B * S, E), torch.randn(B * S, E))
    found = _balance.load_balancing_loss(logits, E, 2, mask)
    torch.testing.assert_close(found, THEIRS(logits, E, 2, mask), rtol=1e-5, atol=0)


@pytest.mark.parametrize("logits", [None, torch.zeros(4, E)])
def test_without_a_tuple_of_logits_it_is_0(logits):
    assert _balance.load_balancing_loss(logits, E) == THEIRS(logits, E) == 0


@pytest.mark.parametrize("mask", [None, MASKS["left"]])
def test_derivatives_of_every_order_and_forward_mode(mask):
    def ours(x):
        return _balance.load_balancing_loss((x, 2 * x), E, 2, mask)

    def theirs(x):
        return THEIRS((x, 2 * x), E, 2, mask)

    x, v = torch.randn(B * S, E), torch.randn(B * S, E)
    # Each of theirs first: histc, which counts there, has no forward mode.
    along = torch.autograd.functional.jvp(theirs, x, v)[1]
    torch.testing.assert_close(torch.func.jvp(ours, (x,), (v,))[1], along)
    twice = torch.autograd.functional.vhp(theirs, x, v)[1]
    torch.testing.assert_close(torch.autograd.functional.vhp(ours, x, v)[1], twice)


def test_only_logits_are_kept_for_the_way_back():
    logits = tuple(torch.randn(B * S, E, requires_grad=True) for _ in range(3))
    kept = []

    def pack(x):
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        _balance.load_balancing_loss(logits, E, 2, MASKS["left"])
    large = [x for x in kept if x.numel() >= logits[0].numel()]
    assert len(large) >= len(logits)
    assert {x.data_ptr() for x in large} == {x.data_ptr() for x in logits}


# Models


@pytest.mark.parametrize("model_type", EVERY)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_losses_and_gradients_of_a_step_are_the_models_own(model_type, mask, calls):
    theirs = built(model_type)
    ours = copy.deepcopy(theirs)
    # Both route by us where they can, so that only the loss differs.
    patch(theirs)
    report = replaced(ours)
    assert report.losses[0].replaced
    found = stepped(ours, mask)
    layers = len(calls)
    assert layers >= 1
    assert_same_step(found, stepped(theirs, mask))
    assert len(calls) == layers


def test_every_model_with_the_loss_is_known_or_known_to_be_another():
    site = Path(transformers.__file__).parents[1]
    found = [fingerprint for _, fingerprint, _ in FINGERPRINTS["of_losses"](site)]
    known = [each for each in found if each in losses.KNOWN]
    assert len(known) > 25
    assert set(found) - set(known) <= set(losses.OTHERS)


OTHER = {
    "DogeForCausalLM": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    "SwitchTransformersForConditionalGeneration": {
        "d_model": 16,
        "d_ff": 8,
        "num_layers": 1,
        "num_decoder_layers": 1,
        "num_experts": 4,
    },
    "NllbMoeForConditionalGeneration": {
        "d_model": 16,
        "num_experts": 4,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_ffn_dim": 8,
        "decoder_ffn_dim": 8,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    },
}
"""Models whose function of the same name computes something else."""


@pytest.mark.parametrize("name", OTHER)
def test_another_loss_is_left(name):
    stock = getattr(transformers, name)
    model = stock(stock.config_class(vocab_size=32, **OTHER[name]))
    with pytest.warns(MoeRoutingWarning, match="load_balancing_loss_func is another: it"):
        report = patch(model, loss=True)
    assert [loss.replaced for loss in report.losses] == [False]
    assert type(model) is stock


def test_a_model_without_the_loss_has_no_line():
    model = AutoModelForCausalLM.from_config(
        AGAINST.CONFIG_MAPPING["deepseek_v3"](**AGAINST.SMALL | AGAINST.WHOLE["deepseek_v3"])
    )
    assert patch(model, loss=True).losses == ()


# One model, and nothing else


def test_another_model_of_the_class_keeps_its_own(calls):
    ours, other = built(), built()
    stock, before = type(other), modeling_mixtral.load_balancing_loss_func
    replaced(ours)
    assert type(other) is type(built()) is stock
    assert modeling_mixtral.load_balancing_loss_func is before
    stepped(other)
    assert calls == []
    stepped(ours)
    assert len(calls) == len(ours.model.layers)


def test_without_loss_a_model_keeps_its_own(calls):
    model = built()
    assert patch(model).losses == ()
    stepped(model)
    assert calls == []


def test_the_loss_is_not_computed_where_nobody_asks(calls):
    model = built()
    replaced(model)
    out = model(input_ids=prompt(), labels=prompt(), output_router_logits=False)
    assert out.aux_loss is None
    assert calls == []


def test_unpatch_gives_the_model_its_own_back(calls):
    model = built()
    stock, forward = type(model), type(model).forward
    replaced(model)
    assert type(model) is not stock
    unpatch(model)
    assert type(model) is stock
    assert type(model).forward is forward
    stepped(model)
    assert calls == []


def test_patched_restores_what_was_before():
    model = built()
    stock = type(model)
    with patched(model, loss=True) as report:
        assert report.losses[0].replaced
        assert type(model) is not stock
    assert type(model) is stock
    replaced(model)
    with patched(model, loss=True):
        pass
    assert type(model) is not stock


def test_patching_twice_changes_nothing():
    model = built()
    replaced(model)
    cls = type(model)
    replaced(model)
    patch(model)  # without loss: it stays
    assert type(model) is cls


def test_a_loss_inside_another_module_is_replaced():
    model = nn.ModuleDict({"inner": built()})
    report = patch(model, loss=True)
    assert [(loss.name, loss.model) for loss in report.losses] == [
        ("inner", "mixtral.MixtralForCausalLM")
    ]


def test_the_class_looks_like_the_models_own():
    model = built()
    stock = type(model)
    replaced(model)
    cls = type(model)
    assert issubclass(cls, stock)
    assert (cls.__name__, cls.__qualname__, cls.__module__) == (
        stock.__name__,
        stock.__qualname__,
        stock.__module__,
    )
    assert inspect.signature(cls.forward) == inspect.signature(stock.forward)
    assert cls.forward.__doc__ == stock.forward.__doc__


def test_the_report_says_it():
    model = built()
    report = replaced(model)
    assert str(report).splitlines()[-2:] == [
        "1 of 1 load balancing losses replaced",
        "[replaced] the model (mixtral.MixtralForCausalLM): load_balancing_loss",
    ]
    assert report.to_dict()["losses"] == [
        {"name": "", "model": "mixtral.MixtralForCausalLM", "reason": "", "replaced": True}
    ]


def test_loss_is_a_bool():
    with pytest.raises(TypeError, match="loss: expected True or False, got 1"):
        patch(built(), loss=1)


# Copies and files


def test_a_copy_computes_ours_and_unpatches_alone(calls):
    model = built()
    replaced(model)
    expected = stepped(model)
    other = copy.deepcopy(model)
    assert type(other) is type(model)
    calls.clear()
    assert_same_step(stepped(other), expected)
    assert calls
    unpatch(other)
    assert losses.is_replaced(model)
    assert not losses.is_replaced(other)


def test_a_saved_model_is_as_if_it_had_not_been_patched(tmp_path):
    model = built()
    names = list(model.state_dict())
    replaced(model)
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.architectures == ["MixtralForCausalLM"]
    assert not losses.is_replaced(again)
    assert_same_step(stepped(again), stepped(model))


@pytest.mark.slow
def test_a_pickled_model_computes_ours_in_a_new_process(tmp_path):
    model = built()
    replaced(model)
    (tmp_path / "model").write_bytes(pickle.dumps(model))
    code = (
        "import pickle, sys; from pathlib import Path;"
        "model = pickle.loads(Path(sys.argv[1]).read_bytes());"
        "from moe_routing.integrations.transformers import losses;"
        "print(losses.is_replaced(model))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split()[-1] == "True"


def test_a_patched_model_is_freed():
    model = built()
    replaced(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


# Around it


def test_accelerates_hook_stays_and_calls_ours(calls):
    model = built()
    accelerate.hooks.add_hook_to_module(model, accelerate.hooks.ModelHook())
    replaced(model)
    stepped(model)
    assert len(calls) == len(model.model.layers)
    unpatch(model)
    stepped(model)
    assert len(calls) == len(model.model.layers)


def test_a_forward_that_somebody_set_is_left():
    model = built()
    model.forward = len
    with pytest.warns(MoeRoutingWarning, match="its forward was replaced before"):
        report = patch(model, loss=True)
    assert not report.losses[0].replaced


def test_a_forward_of_the_class_that_somebody_replaced_is_left(monkeypatch):
    def forward(self, **kwargs):
        return load_balancing_loss_func(own(self, **kwargs))  # noqa: F821 -- never called

    model = built()
    own = type(model).forward
    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.warns(MoeRoutingWarning, match="the forward of mixtral.MixtralForCausalLM was rep"):
        report = patch(model, loss=True)
    assert not report.losses[0].replaced


def test_a_function_that_somebody_put_in_its_place_is_left(monkeypatch):
    def load_balancing_loss_func(*_args):
        return torch.zeros(())

    monkeypatch.setattr(modeling_mixtral, "load_balancing_loss_func", load_balancing_loss_func)
    model = built()
    with pytest.warns(MoeRoutingWarning, match="load_balancing_loss_func is none that is known"):
        report = patch(model, loss=True)
    assert not report.losses[0].replaced


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_gradient_checkpointing_gives_the_same_step(calls):
    model = built()
    expected = stepped(model)
    replaced(model)
    model.gradient_checkpointing_enable()
    model.train()
    assert_same_step(stepped(model), expected)
    assert len(calls) == len(model.model.layers)


def test_all_parts_together():
    model = built("qwen3_moe")
    expected = stepped(model)
    report = patch(model, experts=True, gate=True, loss=True)
    assert report.left == ()
    assert report.losses[0].replaced
    torch.testing.assert_close(stepped(model), expected, rtol=1e-4, atol=1e-5)
