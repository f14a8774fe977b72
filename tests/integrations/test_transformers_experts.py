"""The experts implementation ``"moe_routing"``, compared with those of transformers.

Experts are transformers' classes with random weights: alone, in tiny models, and under expert
parallelism's ids.
"""

from __future__ import annotations

import copy
import importlib
import pickle
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations import moe
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS

import moe_routing
from moe_routing import MoeRoutingWarning
from moe_routing.integrations.transformers import experts as ours
from moe_routing.integrations.transformers import patch, patched, unpatch

AGAINST = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("against.py"))))
E, H, K, T = 6, 24, 3, 40
SIZES = {
    "hidden_size": H,
    "moe_hidden_size": H,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
CLASSES = {
    "afmoe": "AfmoeExperts",
    "aria_text": "aria.AriaExperts",  # transposed weights
    "deepseek_v3": "DeepseekV3Experts",
    "deepseek_v4": "DeepseekV4Experts",  # a gate of its own
    "ernie4_5_moe": "Ernie4_5_MoeExperts",
    "gemma4_text": "gemma4.Gemma4TextExperts",
    "gpt_oss": "GptOssExperts",  # biases, transposed and interleaved weights
    "mixtral": "MixtralExperts",
    "muse_spark_text": "muse_spark.MuseSparkExperts",  # a norm after the experts
    "nemotron_h": "NemotronHExperts",  # no gate
    "openai_privacy_filter": "OpenAIPrivacyFilterExperts",  # biases, transposed weights
    "phimoe": "PhimoeExperts",
    "qwen3_moe": "Qwen3MoeExperts",
}


def takes_an_implementation(model_type):
    """Whether the experts of this transformers' model do; an older one has fewer."""
    folder = folder_and_class(model_type)[0]
    file = Path(transformers.__file__).parent / "models" / folder / f"modeling_{folder}.py"
    return file.exists() and "\n@use_experts_implementation" in file.read_text()


def folder_and_class(model_type):
    folder, _, name = CLASSES[model_type].rpartition(".")
    return folder or model_type, name


HERE = [name for name in CLASSES if takes_an_implementation(name)]
assert len(HERE) >= 10
SUMS = ("gpt_oss", "muse_spark_text")
"""Models with parameters whose gradients are sums over all rows."""
DTYPES = {
    torch.float32: {"rtol": 2e-5, "atol": 2e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 4e-2},
    torch.float16: {"rtol": 3e-3, "atol": 6e-3},
}
"""What roundings of the products' rows and of the sum may move, of values of about 1 to 4."""
IN_MODELS = [name for name in AGAINST.WHOLE if name != "llama4_text"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def _memory_of_nan():
    """Uninitialised memory holds NaN."""
    torch.use_deterministic_algorithms(mode=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(mode=False)


def config_of(model_type):
    return transformers.CONFIG_MAPPING[model_type](**SIZES | dict.fromkeys(COUNTS, E))


def built(model_type, dtype=torch.float32):
    """Build a layer of experts whose outputs are of about 1."""
    torch.manual_seed(sum(map(ord, model_type)))
    folder, name = folder_and_class(model_type)
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    experts = getattr(module, name)(config_of(model_type))
    for parameter in experts.parameters():
        parameter.data.normal_(0.0, 0.5)
    return experts.to(dtype)


def operands(dtype=torch.float32, *, local=E):
    """Return hidden states, ids and weights; ids from ``local`` on are of other ranks' experts."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(T, H, generator=generator).to(dtype)
    ids = torch.rand(T, E, generator=generator).topk(K).indices
    weights = torch.rand(T, K, generator=generator)
    elsewhere = ids >= local
    return hidden, ids.masked_fill(elsewhere, local), weights.masked_fill(elsewhere, 0.0)


def computed(experts, implementation, hidden, ids, weights):
    """Return the output, and in training all gradients."""
    experts.config._experts_implementation = implementation
    experts.zero_grad()
    hidden, weights = (x.clone().requires_grad_(experts.training) for x in (hidden, weights))
    with torch.set_grad_enabled(experts.training):
        output = experts(hidden, ids, weights)
    if not experts.training:
        return [output]
    (output.float() * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    gradients = [hidden.grad, weights.grad, *(p.grad for p in experts.parameters())]
    return [output.detach(), *gradients]


def assert_alike(mine, its, **tolerance):
    assert len(mine) == len(its) >= 1
    for one, other in zip(mine, its, strict=True):
        size = max(1.0, float(other.abs().max()) / 4)  # gradients of weights sum over many rows
        torch.testing.assert_close(
            one, other, rtol=tolerance["rtol"], atol=tolerance["atol"] * size
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model_type", HERE)
def test_experts_compute_what_grouped_mm_does(model_type, dtype):
    experts = built(model_type, dtype).eval()
    for tokens in (T, 1, 0):
        given = [operand[:tokens] for operand in operands(dtype)]
        (mine,), (its,) = (computed(experts, name, *given) for name in (ours.NAME, "grouped_mm"))
        assert mine.shape == (tokens, H)
        assert_alike([mine], [its], **DTYPES[dtype]) if tokens else None
    assert mine.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", HERE)
def test_gradients_are_those_of_grouped_mm(model_type, dtype):
    experts = built(model_type, dtype).train()
    mine, its = (computed(experts, name, *operands(dtype)) for name in (ours.NAME, "grouped_mm"))
    assert len(mine) >= 5
    assert_alike(mine, its, **DTYPES[dtype])


@pytest.mark.usefixtures("_memory_of_nan")
@pytest.mark.parametrize("training", [False, True], ids=["inference", "gradients"])
@pytest.mark.parametrize("model_type", [name for name in HERE if name in {*SUMS, "mixtral"}])
def test_ids_of_other_ranks_experts_add_nothing_and_reach_no_gradient(model_type, training):
    """transformers' expert parallelism gives them the id num_experts, and the weight 0."""
    whole = built(model_type).train(training)
    local = copy.deepcopy(whole)
    local.num_experts, local._is_expert_parallel = E // 2, True
    for name, parameter in whole.named_parameters():
        if "norm" not in name:
            getattr(local, name).data = parameter.data[: E // 2].clone()
    hidden, ids, weights = operands(local=E // 2)
    assert (ids == E // 2).any(dim=1).any()
    mine = computed(local, ours.NAME, hidden, ids, weights)
    its = computed(whole, "eager", hidden, ids, weights)  # whose expert E // 2 has the weight 0
    its = [
        value[: E // 2] if value.shape[0] == E and name != "norm" else value
        for value, name in zip(its, ["", "", "", *_kinds(whole)][: len(its)], strict=True)
    ]
    if training:  # no gradient flows to a weight that is masked
        its[2] = its[2].masked_fill(ids == E // 2, 0.0)
    assert_alike(mine, its, **DTYPES[torch.float32])


def _kinds(experts):
    return ["norm" if "norm" in name else "" for name, _ in experts.named_parameters()]


def test_hidden_states_of_another_dtype_than_the_weights_keep_theirs():
    """As under autocast."""
    experts = built("mixtral", torch.bfloat16).eval()
    hidden, ids, weights = operands()
    (mine,), (its,) = (
        computed(experts, name, hidden, ids, weights) for name in (ours.NAME, "grouped_mm")
    )
    assert mine.dtype == its.dtype == torch.float32
    assert_alike([mine], [its], **DTYPES[torch.bfloat16])


def test_plan_permute_and_combine_are_called_once_a_layer(monkeypatch):
    calls = []

    def counting(name):
        function = getattr(moe_routing, name)
        return lambda *args, **kwargs: calls.append(name) or function(*args, **kwargs)

    for name in ("plan", "permute", "combine"):
        monkeypatch.setattr(ours, name, counting(name))
    computed(built("mixtral").eval(), ours.NAME, *operands())
    assert calls == ["plan", "permute", "combine"]


# Models.


def model_of(model_type, **said):
    torch.manual_seed(sum(map(ord, model_type)))
    config = AGAINST.CONFIG_MAPPING[model_type](
        **AGAINST.SMALL | AGAINST.WHOLE[model_type] | {"initializer_range": 0.3}
    )
    model = AutoModelForCausalLM.from_config(config, **said).eval()
    for module in model.modules():
        if type(module).__name__ == AGAINST.BY_MODEL[model_type].router.rpartition(".")[2]:
            AGAINST.randomize(module, AGAINST.BY_MODEL[model_type].bias)
    return model


def prompt():
    return torch.randint(3, AGAINST.VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(7))


def greedy(model):
    return model.generate(
        prompt(), max_new_tokens=32, min_new_tokens=32, do_sample=False, pad_token_id=0
    )


def implementations(model):
    """Return what the model's experts ask for, of which there is at least one."""
    names = {
        module.config._experts_implementation
        for module in model.modules()
        if hasattr(module, "is_transposed")
    }
    assert names
    return names


@pytest.mark.parametrize(
    "model_type",
    [
        name if name in {"gemma4_text", "gpt_oss"} else pytest.param(name, marks=pytest.mark.slow)
        for name in IN_MODELS
    ],
)
@torch.no_grad()
def test_patched_model_generates_the_tokens_of_grouped_mm(model_type):
    model = model_of(model_type, experts_implementation="grouped_mm")
    theirs, logits = greedy(model), model(prompt()).logits
    report = patch(model, experts=True)
    assert len(report.experts) == len(report.replaced) == 2
    assert all(layer.selected and layer.before == "grouped_mm" for layer in report.experts)
    assert implementations(model) == {"moe_routing"}
    torch.testing.assert_close(model(prompt()).logits, logits, rtol=1e-3, atol=1e-3)
    assert torch.equal(greedy(model), theirs)
    assert len(theirs.unique()) > 10
    assert implementations(model) == {"moe_routing"}  # generate left it
    unpatch(model)
    assert implementations(model) == {"grouped_mm"}
    assert torch.equal(model(prompt()).logits, logits)


def test_generate_leaves_it_in_decode_where_it_changes_grouped_mm():
    with torch.device("meta"):
        model = model_of("mixtral", experts_implementation="grouped_mm")
    with model._optimize_model_for_decode():
        assert implementations(model) == {"batched_mm"}
    patch(model, experts=True)
    with model._optimize_model_for_decode():
        assert implementations(model) == {"moe_routing"}
    assert implementations(model) == {"moe_routing"}


def test_the_name_is_taken_at_loading_and_not_saved(tmp_path):
    model = model_of("mixtral", experts_implementation="moe_routing")
    assert implementations(model) == {"moe_routing"}
    model.save_pretrained(tmp_path)
    assert "moe_routing" not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moe_routing")
    assert implementations(loaded) == {"moe_routing"}
    assert torch.equal(loaded(prompt()).logits, model(prompt()).logits)
    assert implementations(AutoModelForCausalLM.from_pretrained(tmp_path)) == {"grouped_mm"}


def test_set_experts_implementation_takes_the_name():
    model = model_of("mixtral", experts_implementation="grouped_mm")
    model.set_experts_implementation("moe_routing")
    assert implementations(model) == {"moe_routing"}


def test_patch_leaves_experts_alone_unless_asked():
    model = model_of("mixtral", experts_implementation="grouped_mm")
    assert patch(model).experts == ()
    assert implementations(model) == {"grouped_mm"}


def test_patching_twice_and_unpatching_gives_the_first_one_back():
    model = model_of("mixtral", experts_implementation="batched_mm")
    first, second = (patch(model, experts=True) for _ in range(2))
    assert first == second
    unpatch(model)
    assert implementations(model) == {"batched_mm"}
    unpatch(model)
    assert implementations(model) == {"batched_mm"}


def test_unpatch_keeps_what_was_selected_after_patch_or_before_it():
    model = model_of("mixtral", experts_implementation="grouped_mm")
    patch(model, experts=True)
    model.set_experts_implementation("eager")
    unpatch(model)
    assert implementations(model) == {"eager"}
    model.set_experts_implementation("moe_routing")
    patch(model, experts=True)
    unpatch(model)
    assert implementations(model) == {"moe_routing"}


def test_patched_selects_inside_the_block():
    model = model_of("mixtral", experts_implementation="grouped_mm")
    with patched(model, experts=True) as report:
        assert implementations(model) == {"moe_routing"}
        assert len(report.experts) == 2
    assert implementations(model) == {"grouped_mm"}
    patch(model, experts=True)
    with patched(model, experts=True):
        pass
    assert implementations(model) == {"moe_routing"}


def test_copies_and_pickles_keep_it_and_can_be_unpatched():
    model = model_of("mixtral", experts_implementation="grouped_mm")
    patch(model, experts=True)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 -- its own
        assert implementations(other) == {"moe_routing"}
        unpatch(other)
        assert implementations(other) == {"grouped_mm"}
    assert implementations(model) == {"moe_routing"}


def test_importing_the_integration_registers_it_and_importing_moe_routing_does_not():
    program = (
        "import sys, moe_routing; assert 'transformers' not in sys.modules\n"
        "import moe_routing.integrations.transformers\n"
        "from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as known\n"
        "print(known['moe_routing'].__module__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ours.__name__


# What is left alone.


def left(model, reason):
    with pytest.warns(MoeRoutingWarning, match=reason) as warned:
        report = patch(model, experts=True)
    assert "[replaced]" not in str(warned[0].message)
    assert not any(layer.selected for layer in report.experts)
    return report


def test_the_report_has_a_line_for_experts():
    model = model_of("mixtral", experts_implementation="grouped_mm")
    report = patch(model, experts=True)
    assert str(report).splitlines()[2:] == [
        "2 of 2 layers of experts replaced",
        (
            "[replaced] model.layers.0.mlp.experts to model.layers.1.mlp.experts (2) "
            "(mixtral.MixtralExperts): plan, permute, combine in place of grouped_mm"
        ),
    ]
    assert report.to_dict()["experts"][0] == {
        "name": "model.layers.0.mlp.experts",
        "experts": "mixtral.MixtralExperts",
        "before": "grouped_mm",
        "reason": "",
        "selected": True,
    }
    assert [row.name for row in report.experts] == [
        f"model.layers.{index}.mlp.experts" for index in range(2)
    ]


def test_experts_that_take_no_implementation_are_left():
    report = left(model_of("llama4_text"), "takes no experts implementation")
    assert len(report.experts) == 2


def test_experts_of_another_interface_are_left():
    model = model_of("mixtral", experts_implementation="grouped_mm")

    @moe.use_experts_implementation(experts_interface=ALL_FP8_EXPERTS_FUNCTIONS)
    class Experts(nn.Module):
        def __init__(self, _config):
            super().__init__()

        def forward(self, *operands):
            return operands[0]

    model.model.layers[1].mlp.experts = Experts(model.config)
    report = left(model, "takes its implementations from FP8ExpertsInterface")
    assert "shares its configuration with model.layers.1.mlp.experts" in report.experts[0].reason
    assert implementations(model) == {"grouped_mm"}


def test_weights_that_combine_does_not_take_are_left():
    model = model_of("mixtral", experts_implementation="grouped_mm").double()
    left(model, "its weights are float64; combine takes bfloat16, float16 or float32")
    assert implementations(model) == {"grouped_mm"}


def test_experts_whose_forward_was_replaced_are_left():
    model = model_of("mixtral", experts_implementation="grouped_mm")
    model.model.layers[0].mlp.experts.forward = lambda *args: args[0]
    report = left(model, "its forward was replaced before")
    assert "shares its configuration" in report.experts[1].reason
    assert implementations(model) == {"grouped_mm"}


def test_experts_of_a_release_that_is_not_known_are_refused_by_name(monkeypatch):
    def grouped_mm_experts_forward(*operands):
        return operands[1]

    before = moe.grouped_mm_experts_forward
    monkeypatch.setattr(moe, "grouped_mm_experts_forward", grouped_mm_experts_forward)
    importlib.reload(ours)
    try:
        model = model_of("mixtral", experts_implementation="grouped_mm")
        left(model, "grouped_mm_experts_forward is none that is known")
        model.set_experts_implementation("moe_routing")
        with pytest.raises(RuntimeError, match=r'experts_implementation: "moe_routing" cannot'):
            model(prompt())
    finally:
        monkeypatch.setattr(moe, "grouped_mm_experts_forward", before)
        importlib.reload(ours)


# Compiled, and on a GPU.


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:torch")  # of Inductor, about this machine
@pytest.mark.parametrize("training", [False, True], ids=["inference", "gradients"])
@pytest.mark.parametrize("model_type", ["gemma4_text", "gpt_oss"])
def test_compiled_experts_are_one_graph(model_type, training):
    experts = built(model_type).train(training)
    its = computed(experts, ours.NAME, *operands())
    experts.compile(fullgraph=True, backend="aot_eager")
    assert_alike(computed(experts, ours.NAME, *operands()), its, **DTYPES[torch.float32])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model_type", [name for name in HERE if name in {*SUMS, "gemma4_text"}])
def test_experts_on_a_gpu_compute_what_grouped_mm_does_and_can_be_captured(model_type, dtype):
    experts = built(model_type, dtype).cuda()
    given = [operand.cuda() for operand in operands(dtype)]
    for training in (False, True):
        experts.train(training)
        mine, its = (computed(experts, name, *given) for name in (ours.NAME, "grouped_mm"))
        assert_alike(mine, its, **DTYPES[dtype])
    if dtype == torch.bfloat16:  # for other dtypes transformers may read offsets on the host
        experts.eval()
        experts.config._experts_implementation = ours.NAME
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            captured = experts(*given)
        for operand in given:
            operand.copy_(operand.flip(0))
        graph.replay()
        assert torch.equal(captured, computed(experts, ours.NAME, *given)[0])
