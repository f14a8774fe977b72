"""``torch.compile(fullgraph=True)`` of patched models.

They get few tokens and many, with every implementation of the experts, in inference and training.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_routing.integrations.transformers import patch, routers

AGAINST = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("against.py"))))
MODELS = ("mixtral", "qwen3_moe", "deepseek_v3", "gemma4_text")
NEEDS_A_GPU = {"deepgemm", "sonicmoe", "deepgemm_megamoe"}
EXPERTS = sorted({"eager", *ALL_EXPERTS_FUNCTIONS} - NEEDS_A_GPU)
TRACED_IN_PARTS = {"eager"}
"""Experts that loop over those that got tokens.

Dynamo cannot trace them as one graph. They are traced here, but not compiled.
"""
BY_INDUCTOR = {"grouped_mm"}
"""Experts whose models are compiled to machine code.

The others stop at AOTAutograd's graph, which takes less time.
"""
TO_MACHINE_CODE = {("inference", "one token"), ("training", "more tokens")}
"""The two graphs of such a model, of four, that Inductor compiles.

One is of inference and one of training, and each has its kind of shapes.
"""
WITH_EVERY_MODEL = {"grouped_mm", "moe_routing"}
"""Experts that every model is compiled with; each of the others has one model at least."""
OTHERS = sorted(set(EXPERTS) - WITH_EVERY_MODEL)
assert len(OTHERS) <= len(MODELS)
TOKENS = (1, 2, 3, 7, 130)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),  # of Inductor, about this machine
]


@pytest.fixture(autouse=True)
def _a_fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def built(model_type, experts):
    torch.manual_seed(sum(map(ord, model_type)))
    sizes = (
        AGAINST.SMALL
        | AGAINST.WHOLE[model_type]
        | {"max_position_embeddings": 256, "num_hidden_layers": 1}
    )
    config = AGAINST.CONFIG_MAPPING[model_type](**sizes)
    model = AutoModelForCausalLM.from_config(
        config, experts_implementation=experts, attn_implementation="eager"
    )
    for module in model.modules():
        if type(module).__name__ == AGAINST.BY_MODEL[model_type].router.rpartition(".")[2]:
            AGAINST.randomize(module, AGAINST.BY_MODEL[model_type].bias)
    return model


def passed(model, ids, *, training):
    """Return logits, and in training the gradients of the routers and of the embedding."""
    model.zero_grad()
    with torch.set_grad_enabled(training):
        logits = model(input_ids=ids, use_cache=False).logits
    if not training:
        return [logits]
    logits.float().square().mean().backward()
    named = [
        (name, p.grad)
        for name, p in model.named_parameters()
        if "gate.weight" in name or "router" in name or "embed" in name
    ]
    return [logits.detach(), *(gradient for _, gradient in named if gradient is not None)]


def compiled_by_backend(model, experts):
    """Return a function from a kind of graph to the compiled model."""
    if experts in TRACED_IN_PARTS:
        model.model.layers[0].compile(
            backend="eager"
        )  # what surrounds the layer is traced for the other experts
        return lambda _: model
    backends = {
        backend: torch.compile(model, fullgraph=True, backend=backend)
        for backend in ("inductor", "aot_eager")
    }
    return lambda kind: backends[
        "inductor" if experts in BY_INDUCTOR and kind in TO_MACHINE_CODE else "aot_eager"
    ]


@pytest.mark.parametrize(
    ("model_type", "experts", "gate"),
    [
        *(
            (model, experts, False)
            for n, model in enumerate(MODELS)
            for experts in (*sorted(WITH_EVERY_MODEL), OTHERS[n % len(OTHERS)])
        ),
        ("mixtral", "grouped_mm", True),
    ],
)
def test_a_compiled_patched_model_computes_what_the_model_alone_does(model_type, experts, gate):
    model, stock = built(model_type, experts), built(model_type, experts)
    report = patch(model, gate=gate)
    assert len(report.replaced) == 1
    assert [layer.gated for layer in report.gates] == [True] * gate
    compiled = compiled_by_backend(model, experts)
    for training in (False, True):
        model.train(training)
        stock.train(training)
        for tokens in TOKENS:
            ids = torch.randint(
                3, AGAINST.VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(tokens)
            )
            kind = (
                "training" if training else "inference",
                "one token" if tokens == 1 else "more tokens",
            )
            ours, theirs = (
                passed(each, ids, training=training) for each in (compiled(kind), stock)
            )
            assert len(ours) == len(theirs) >= (2 if training else 1)
            for mine, its in zip(ours, theirs, strict=True):
                torch.testing.assert_close(mine, its, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("model_type", MODELS)
@torch.no_grad()
def test_a_compiled_router_alone_is_one_graph_at_any_number_of_tokens(model_type, tokens):
    model = built(model_type, "eager").eval()
    name = AGAINST.BY_MODEL[model_type].router.rpartition(".")[2]
    router = next(module for module in model.modules() if type(module).__name__ == name)
    hidden = torch.randn(tokens, AGAINST.H)
    theirs = router(hidden)
    patch(router)
    assert type(router).__module__ == routers.__name__
    ours = torch.compile(router, fullgraph=True, backend="aot_eager")(hidden)
    AGAINST.assert_same_items(AGAINST.in_order_of_ids(ours), AGAINST.in_order_of_ids(theirs))


@pytest.mark.parametrize("padding", [0, 5])
def test_a_compiled_step_with_the_balancing_loss_gives_the_models_own(padding):
    model, stock = (built("qwen3_moe", "grouped_mm") for _ in range(2))
    assert patch(model, loss=True).losses[0].replaced
    ids = torch.randint(3, AGAINST.VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(16) >= torch.tensor([[padding], [0]])).long() if padding else None
    # The first forward sets transformers' hooks for the logits under a lock, which Dynamo refuses.
    with torch.no_grad():
        model(input_ids=ids, output_router_logits=True)
    found = []
    for each in (torch.compile(model, fullgraph=True, backend="aot_eager"), stock):
        out = each(
            input_ids=ids,
            attention_mask=mask,
            labels=ids,
            use_cache=False,
            output_router_logits=True,
        )
        out.loss.backward()
        found.append([out.loss, out.aux_loss])
    ours, theirs = ([p.grad for p in each.parameters()] for each in (model, stock))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-5)
