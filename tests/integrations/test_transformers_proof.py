"""A router without proof that its code is known keeps that code.

The report says why.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, SwitchTransformersConfig
from transformers.models.mixtral import modeling_mixtral

from moe_routing import MoeRoutingWarning
from moe_routing.cli._app import run
from moe_routing.integrations.transformers import patch, patched, unpatch
from moe_routing.integrations.transformers._fingerprint import RefusedError, fingerprint
from moe_routing.integrations.transformers._proof import known, recipe_of
from moe_routing.integrations.transformers._recipes import RECIPES

SIZES = {
    "vocab_size": 8,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
ROUTER = modeling_mixtral.MixtralTopKRouter


@pytest.fixture
def model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MixtralConfig(**SIZES, num_hidden_layers=3)).eval()


def left(model, reason):
    """Patch, expect the warning, and return the report."""
    with pytest.warns(MoeRoutingWarning, match=reason):
        return patch(model)


def loaded(tmp_path, source, name):
    """Import a module of that name from a file of its own."""
    file = tmp_path / f"{name.rpartition('.')[2]}.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_class_of_the_same_name_from_elsewhere_is_left(model):
    class MixtralTopKRouter(ROUTER):
        pass

    model.model.layers[1].mlp.gate.__class__ = MixtralTopKRouter
    report = left(model, "is no router that is known here")
    assert [layer.replaced for layer in report.layers] == [True, False, True]
    assert type(model.model.layers[1].mlp.gate) is MixtralTopKRouter


def test_a_class_whose_forward_was_replaced_is_left(model, monkeypatch):
    stock = ROUTER.forward

    def forward(self, hidden_states):
        return stock(self, hidden_states)

    monkeypatch.setattr(ROUTER, "forward", forward)
    reason = (
        r"the forward of MixtralTopKRouter was replaced, by .*is_left.<locals>.forward; "
        "put the class's own back"
    )
    assert len(left(model, reason).left) == 3


def test_a_class_whose_forward_was_wrapped_is_left(model, monkeypatch):
    import functools

    stock = ROUTER.forward

    @functools.wraps(stock)
    def forward(*args):
        return stock(*args)

    monkeypatch.setattr(ROUTER, "forward", forward)
    assert len(left(model, r"was replaced, by .*was_wrapped_is_left.<locals>.forward").left) == 3


def test_a_router_with_a_forward_of_its_own_is_left_and_keeps_it(model):
    gate = model.model.layers[0].mlp.gate
    gate.forward = mine = lambda hidden: ROUTER.forward(gate, hidden)
    report = left(model, "its forward was replaced before")
    assert len(report.left) == 1
    unpatch(model)
    assert vars(gate)["forward"] is mine


def test_a_block_whose_forward_was_replaced_is_left(model):
    block = model.model.layers[0].mlp
    block.forward = lambda hidden: hidden
    report = left(model, r"the forward of mixtral.MixtralSparseMoeBlock around it was replaced")
    assert [layer.replaced for layer in report.layers] == [False, True, True]


def test_a_block_hooked_by_accelerate_is_patched(model):
    block = model.model.layers[0].mlp
    block._old_forward = stock = block.forward
    block.forward = lambda hidden: stock(hidden.clone())
    with patched(model) as report:
        assert report.left == ()


def test_a_model_whose_routing_cannot_be_expressed_is_left_with_the_reason():
    sizes = {
        "d_model": 16,
        "d_ff": 8,
        "d_kv": 8,
        "num_heads": 2,
        "num_layers": 2,
        "vocab_size": 8,
        "num_sparse_encoder_layers": 1,
    }
    switch = transformers.SwitchTransformersModel(SwitchTransformersConfig(**sizes, num_experts=4))
    report = left(switch, "tokens beyond an expert's capacity are dropped")
    assert report.replaced == ()


def test_a_block_with_experts_and_an_unknown_router_is_left():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.my_gate, self.experts = nn.Linear(4, 2), nn.ModuleList([nn.Linear(4, 4)])

    report = left(nn.Sequential(Block()), "no router in it is known here")
    assert report.layers[0].name == "0"
    assert report.layers[0].router.endswith("Block")


def test_a_model_without_experts_has_an_empty_report():
    assert patch(nn.Linear(2, 2)).layers == ()


@pytest.mark.parametrize("call", [patch, unpatch, lambda model: patched(model).__enter__()])
def test_what_is_no_module_is_refused_by_name(call):
    with pytest.raises(TypeError, match=r"^model: expected a torch.nn.Module, got 'mixtral'"):
        call("mixtral")


SOURCE = """
class Router:
    def __init__(self):
        self.a = 1

    def forward(self, x):
        return helper(x) + self.a

def helper(x):
    return x * 2
"""
SAME = '''
class Another:
    """A docstring."""

    def forward(self, x: int) -> int:
        """Another."""  # and a comment
        return (
            helper(x) +
            self.a)

def helper(x):  # layout, names of classes, annotations and __init__ change nothing
    """A third."""
    return x * 2
'''


def test_fingerprint_is_of_what_is_computed(tmp_path):
    first = loaded(tmp_path, SOURCE, "one").Router
    assert fingerprint(loaded(tmp_path, SAME, "two").Another) == fingerprint(first)
    for index, (old, new) in enumerate(
        [
            ("+ self", "- self"),
            ("x * 2", "x * 3"),
            ("self.a\n", "self.b\n"),
            ("Router:", "Router(dict):"),
        ]
    ):
        changed = loaded(tmp_path, SOURCE.replace(old, new), f"changed{index}").Router
        assert fingerprint(changed) != fingerprint(first), new


def test_a_class_without_source_is_refused():
    names = {}
    exec("class Router:\n    def forward(self):\n        return 1\n", names)  # noqa: S102 -- code without a file is the case
    with pytest.raises(RefusedError, match=r"the source of Router.forward cannot be read"):
        fingerprint(names["Router"])


def test_the_name_alone_proves_nothing(tmp_path):
    source = (
        "from torch import nn\nclass MixtralTopKRouter(nn.Module):\n"
        "    def forward(self, x):\n        return x, x, x\n"
    )
    module = loaded(tmp_path, source, "transformers.models.mixtral.modeling_mixtral")
    with pytest.raises(
        RefusedError, match=r"the code of mixtral.MixtralTopKRouter is none that is known"
    ):
        recipe_of(module.MixtralTopKRouter)


@pytest.mark.parametrize(
    "path",
    [
        "mixtral.MixtralTopKRouter",
        "longcat_flash.LongcatFlashTopkRouter",
        "phimoe.PhimoeTopKRouter",
    ],
)
def test_the_script_that_compares_releases_sees_what_the_proof_sees(path):
    script = Path(__file__).with_name("fingerprints.py")
    spec = importlib.util.spec_from_file_location("fingerprints", script)
    fingerprints = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fingerprints)
    folder, _, name = path.partition(".")
    cls = getattr(importlib.import_module(f"transformers.models.{folder}.modeling_{folder}"), name)
    assert fingerprints.of_release(Path(transformers.__file__).parents[1], path)[0] == fingerprint(
        cls
    )
    assert recipe_of(cls) is RECIPES[known()[path][fingerprint(cls)]]


def test_report_says_what_was_replaced_by_what(model):
    report = patch(model)
    assert str(report).splitlines() == [
        "3 of 3 routers replaced",
        (
            "[replaced] model.layers.0.mlp.gate to model.layers.2.mlp.gate (3) "
            "(mixtral.MixtralTopKRouter): ids = topk(l); w = softmax(l[ids]) by eager"
        ),
    ]
    said = report.to_dict()
    assert json.loads(json.dumps(said)) == said
    assert said["layers"][0] == {
        "name": "model.layers.0.mlp.gate",
        "router": "mixtral.MixtralTopKRouter",
        "routing": "ids = topk(l); w = softmax(l[ids])",
        "backend": "eager",
        "reason": "",
        "replaced": True,
    }
    console = Console(width=100, record=True, file=sys.stderr)
    console.print(report)
    shown = console.export_text()
    assert "3 of 3 routers replaced" in shown
    assert "eager" in shown


@pytest.fixture
def cli(capsys):
    def call(*arguments):
        return run(arguments), *capsys.readouterr()

    return call


def test_command_shows_what_would_be_replaced_by_a_model_type_or_a_folder(cli, model, tmp_path):
    model.config.save_pretrained(tmp_path)
    code, said, _ = cli("transformers", str(tmp_path))
    assert code == 0
    assert "3 of 3 routers replaced" in said
    assert "mixtral.MixtralTopKRouter" in said
    code, said, _ = cli("transformers", "mixtral", "--json")
    assert code == 0
    assert [layer["replaced"] for layer in json.loads(said)["layers"]] == [True] * 32


@pytest.mark.slow
def test_command_is_exit_code_1_where_a_router_is_left_or_there_is_none(cli):
    code, said, _ = cli("transformers", "switch_transformers")
    assert code == 1
    assert "0 of 6 routers replaced" in said
    assert "tokens beyond an expert's capacity are dropped" in said
    code, said, _ = cli("transformers", "bert")
    assert code == 1
    assert "bert has no mixture-of-experts layer" in said


def test_command_is_exit_code_2_for_what_is_no_model(cli):
    code, _, said = cli("transformers", "nosuch")
    assert code == 2
    assert said == (
        "moe-routing: MODEL: expected a model_type of transformers or a folder with a config.json, "
        "got 'nosuch'\n"
    )
