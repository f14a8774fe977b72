"""Every preset against the router that transformers itself runs.

Classes are real, weights are random, and both get the same logits.

A case names the router's class and the settings worth telling apart. The configuration class is
transformers', our side reads it with ``from_config``, and the logits are those that the module
computed. Where transformers leaves its ids unsorted they are compared as sets; weights are compared
expert by expert. Everything runs in float32, so that no rounding to a smaller dtype stands between
the two.
"""

from __future__ import annotations

import importlib
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import moe_routing
from moe_routing.models import MODELS, from_config
from moe_routing.reference import oracle

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

T, H, E, K, VOCABULARY = 96, 64, 24, 3, 50
pytestmark = pytest.mark.usefixtures("one_thread")


class Routed(NamedTuple):
    """What transformers' module computed: its logits, and the weights and ids that it returned."""

    logits: Tensor
    weights: Tensor
    ids: Tensor


def returned(_router, _args, output):
    return Routed(*output[:3])


def linear(router, args, output):
    """For routers that return logits which are already capped or multiplied."""
    return Routed(nn.functional.linear(args[0].reshape(-1, H), router.weight), *output[1:3])


def gemma(router, args, output):
    """The router returns probabilities; the logits are what its projection gives."""
    seen = []
    handle = router.proj.register_forward_hook(
        lambda _module, _args, projected: seen.append(projected)
    )
    router(*args)
    handle.remove()
    return Routed(seen[0], *output[1:3])


def llama(_router, _args, output):
    scores, logits = output
    weights, ids = scores.topk(int((scores[0] > 0).sum()), dim=-1)
    return Routed(logits, weights, ids)


def jetmoe(router, _args, output):
    """The router returns its pairs of token and expert sorted by expert."""
    _, tokens, gates, sizes, logits = output
    experts = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    dense = torch.zeros(logits.shape).index_put((tokens, experts), gates)
    weights, ids = dense.topk(router.top_k, dim=-1)
    return Routed(logits, weights, ids)


def dbrx(block, args, _output):
    logits = block.router(args[0])
    return Routed(logits, *block.route_tokens_to_experts(logits))


def zaya(router, _args, output):
    """The expert that skips gets the id 0 there and stays the last one here."""
    logits, weights, ids = output[:3]
    skipped = (ids == 0) & (weights == 0)
    return Routed(logits, weights, ids.masked_fill(skipped, router.num_experts))


def flat(hidden, _bias):
    return (hidden,)


def with_bias(hidden, bias):
    return (hidden, bias)


def batched(hidden, _bias):
    return (hidden.view(2, -1, H),)


def batched_with_bias(hidden, bias):
    return (hidden.view(2, -1, H), bias)


def with_token_ids(hidden, _bias):
    return (hidden, torch.randint(VOCABULARY, (1, len(hidden))))


@dataclass(frozen=True)
class Case:
    """How to build a router of transformers, call it, and read what it did.

    :ivar model: the model name; its configuration class is transformers' unless ``config`` names
        another.
    :ivar router: module and class under ``transformers.models``.
    :ivar settings: values of configuration attributes; each is a test.
    :ivar ordered: whether transformers' ids come sorted.
    :ivar factor: the attribute by which the model scales its experts' sum after the router.
    :ivar config: the model type whose configuration class is used, where the preset's name is none
        of transformers'.
    :ivar bias: the range of the random biases: as wide as the scores, so that both decide.
    :ivar layer: further arguments of the router's class.
    """

    model: str
    router: str
    settings: tuple[Mapping[str, Any], ...] = ({},)
    arguments: Callable[[Tensor, Tensor], tuple[Tensor, ...]] = flat
    read: Callable[[nn.Module, tuple[Tensor, ...], Any], Routed] = returned
    ordered: bool = True
    factor: str = ""
    config: str = ""
    bias: tuple[float, float] = (-0.3, 0.3)
    layer: tuple[int, ...] = ()


SMALL_BIAS = (-0.03, 0.03)
NORM = ({"norm_topk_prob": True}, {"norm_topk_prob": False})
DEEPSEEK = (
    {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True},
    {"n_group": 8, "topk_group": 5, "routed_scaling_factor": 0.5, "norm_topk_prob": False},
    {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.5, "norm_topk_prob": True},
)
KIMI = tuple(
    {
        "num_expert_group": said["n_group"],
        "topk_group": said["topk_group"],
        "routed_scaling_factor": said["routed_scaling_factor"],
        "moe_renormalize": said["norm_topk_prob"],
    }
    for said in DEEPSEEK
)
DEEPSEEK_V2 = (
    {"topk_method": "greedy", "n_group": None, "topk_group": None, "routed_scaling_factor": 1.5},
    {
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 16.0,
    },
)
MISTRAL = tuple(
    {name: value for name, value in said.items() if name != "norm_topk_prob"} for said in DEEPSEEK
)
SCALED = ({"routed_scaling_factor": 1.0}, {"routed_scaling_factor": 2.5})


def deepseek(model, router, settings=DEEPSEEK, **other):
    return Case(model, router, settings, ordered=False, **other)


CASES = (
    Case("mixtral", "mixtral.MixtralTopKRouter"),
    Case("minimax", "minimax.MiniMaxTopKRouter"),
    Case("qwen2_moe", "qwen2_moe.Qwen2MoeTopKRouter", NORM),
    Case("qwen3_moe", "qwen3_moe.Qwen3MoeTopKRouter", NORM),
    Case("qwen3_next", "qwen3_next.Qwen3NextTopKRouter", NORM),
    Case("qwen3_5_moe_text", "qwen3_5_moe.Qwen3_5MoeTopKRouter"),
    Case("qwen3_vl_moe_text", "qwen3_vl_moe.Qwen3VLMoeTextTopKRouter"),
    Case("qwen3_omni_moe_text", "qwen3_omni_moe.Qwen3OmniMoeThinkerTextTopKRouter", NORM),
    Case("qwen3_omni_moe_talker_text", "qwen3_omni_moe.Qwen3OmniMoeTalkerTextTopKRouter", NORM),
    Case("qwen4_exp_text", "qwen4_exp.Qwen4ExpTextTopKRouter", NORM),
    Case("olmoe", "olmoe.OlmoeTopKRouter", NORM),
    Case("flex_olmo", "flex_olmo.FlexOlmoTopKRouter", NORM),
    Case("mellum", "mellum.MellumTopKRouter", NORM),
    Case("lara_mini", "lara_mini.LaraMiniTopKRouter", NORM),
    Case("jamba", "jamba.JambaTopKRouter"),
    Case(
        "hunyuan_v1_moe", "hunyuan_v1_moe.HunYuanMoEV1Gate", ({}, {"moe_topk": [K, K]}), layer=(0,)
    ),
    Case(
        "dbrx",
        "dbrx.DbrxFFN",
        tuple(
            {"ffn_config": {"moe_normalize_expert_weights": p, "ffn_hidden_size": 8}, "d_model": H}
            for p in (1.0, None)
        ),
        batched,
        dbrx,
    ),
    Case("deepseek_v2", "deepseek_v2.DeepseekV2TopkRouter", DEEPSEEK_V2, ordered=False),
    Case(
        "deepseek_ocr2_text", "deepseek_ocr2.DeepseekOcr2TextTopkRouter", DEEPSEEK_V2, ordered=False
    ),
    Case(
        "unlimited_ocr_text", "unlimited_ocr.UnlimitedOcrTextTopkRouter", DEEPSEEK_V2, ordered=False
    ),
    Case("mistral4", "mistral4.Mistral4TopkRouter", DEEPSEEK, ordered=False),
    Case(
        "mistral_large4_text", "mistral_large4.MistralLarge4TextTopkRouter", MISTRAL, ordered=False
    ),
    Case("gpt_oss", "gpt_oss.GptOssTopKRouter"),
    Case(
        "openai_privacy_filter",
        "openai_privacy_filter.OpenAIPrivacyFilterTopKRouter",
        factor="num_experts_per_tok",
    ),
    Case("aria_text", "aria.AriaTextTopKRouter"),
    Case("granitemoe", "granitemoe.GraniteMoeTopKRouter"),
    Case("granitemoe_swa", "granitemoe_swa.GraniteMoeSWATopKRouter"),
    Case("granitemoehybrid", "granitemoehybrid.GraniteMoeHybridTopKRouter"),
    Case("granitemoeshared", "granitemoeshared.GraniteMoeSharedTopKRouter"),
    Case("jetmoe", "jetmoe.JetMoeTopKGating", read=jetmoe),
    Case(
        "cohere2_moe",
        "cohere2_moe.Cohere2MoeTopKRouter",
        tuple(
            {"expert_selection_fn": fn, **norm} for fn in ("softmax", "sigmoid") for norm in NORM
        ),
    ),
    Case("gemma4_text", "gemma4.Gemma4TextRouter", ({"enable_moe_block": True},), read=gemma),
    Case("diffusion_gemma_text", "diffusion_gemma.DiffusionGemmaTextRouter", read=gemma),
    Case(
        "ernie4_5_moe",
        "ernie4_5_moe.Ernie4_5_MoeTopKRouter",
        ({}, {"moe_norm_min": 0.5}),
        bias=SMALL_BIAS,
    ),
    Case(
        "ernie4_5_vl_moe_text",
        "ernie4_5_vl_moe.Ernie4_5_VLMoeMoeTopKRouter",
        ({}, {"moe_norm_min": 0.5}),
        bias=SMALL_BIAS,
    ),
    Case(
        "longcat_flash",
        "longcat_flash.LongcatFlashTopkRouter",
        ({"zero_expert_num": 8, **SCALED[1]}, {"zero_expert_num": 0}),
        ordered=False,
        bias=SMALL_BIAS,
    ),
    Case(
        "zaya",
        "zaya.ZayaRouter",
        ({"num_experts_per_tok": 1},),
        batched,
        zaya,
        bias=SMALL_BIAS,
        layer=(0,),
    ),
    deepseek("deepseek_v3", "deepseek_v3.DeepseekV3TopkRouter"),
    deepseek("deepseek_v32", "deepseek_v32.DeepseekV32TopkRouter"),
    deepseek("axk1", "axk1.AXK1TopkRouter"),
    deepseek(
        "axk2",
        "axk2.AXK2TopkRouter",
        (*DEEPSEEK, {"n_group": None, "topk_group": None}),
        bias=(0.0, 0.3),
    ),  # masked: 0
    deepseek("beam", "beam.BeamTopKRouter", factor="routed_scaling_factor"),
    deepseek("bailing_hybrid", "bailing_hybrid.BailingHybridTopkRouter", KIMI),
    deepseek("kimi_linear", "kimi_linear.KimiLinearTopkRouter", KIMI),
    deepseek("dots1", "dots1.Dots1TopkRouter"),
    deepseek("dots3_note_text", "dots3_note.Dots3NoteTextTopkRouter"),
    deepseek("exaone_moe", "exaone_moe.ExaoneMoeTopkRouter"),
    deepseek("glm4_moe", "glm4_moe.Glm4MoeTopkRouter"),
    deepseek("glm4_moe_lite", "glm4_moe_lite.Glm4MoeLiteTopkRouter"),
    deepseek("glm4v_moe_text", "glm4v_moe.Glm4vMoeTextTopkRouter"),
    deepseek("glm5_next_text", "glm5_next.Glm5NextTextTopkRouter"),
    deepseek("glm_moe_dsa", "glm_moe_dsa.GlmMoeDsaTopkRouter"),
    deepseek("hy_v4", "hy_v4.HYV4TopkRouter"),
    deepseek("hy_v4_vl_text", "hy_v4_vl.HYV4VLTopkRouter"),
    deepseek("mimo_v2_flash", "mimo_v2_flash.MiMoV2FlashTopkRouter"),
    deepseek("nemotron_h", "nemotron_h.NemotronHTopkRouter"),
    deepseek("sarvam_mla", "deepseek_v3.DeepseekV3TopkRouter"),
    deepseek("sarvam_moe", "glm4_moe.Glm4MoeTopkRouter"),
    deepseek("solar_open", "solar_open.SolarOpenTopkRouter"),
    deepseek(
        "kimi_k2",
        "deepseek_v3.DeepseekV3TopkRouter",
        tuple({"scoring_func": "sigmoid", "topk_method": "noaux_tc", **said} for said in DEEPSEEK),
        config="deepseek_v3",
    ),
    Case("afmoe", "afmoe.AfmoeTokenChoiceRouter", ({"route_scale": 2.5},), batched_with_bias),
    Case("minimax_m2", "minimax_m2.MiniMaxM2TopKRouter", arguments=with_bias, ordered=False),
    Case(
        "minimax_m3_vl_text",
        "minimax_m3_vl.MiniMaxM3VLTopKRouter",
        SCALED,
        ordered=False,
        factor="routed_scaling_factor",
    ),
    Case(
        "step3p5",
        "step3p7.Step3p7TopKRouter",
        ({"moe_router_scaling_factor": 3.0},),
        ordered=False,
        factor="moe_router_scaling_factor",
    ),
    Case(
        "laguna",
        "laguna.LagunaTopKRouter",
        (
            {"moe_router_logit_softcapping": 0.7, "moe_routed_scaling_factor": 2.5},
            {"moe_router_logit_softcapping": 0.0},
        ),
        read=linear,
        factor="moe_routed_scaling_factor",
    ),
    Case(
        "lfm2_moe",
        "lfm2_moe.Lfm2MoeTopKRouter",
        tuple(
            {"use_expert_bias": biased, **norm, **SCALED[1]}
            for biased in (True, False)
            for norm in NORM
        ),
        with_bias,
    ),
    Case(
        "hy_v3", "hy_v3.HYV3TopKRouter", ({"router_scaling_factor": 1.5},), with_bias, ordered=False
    ),
    Case(
        "dots3_note_vision_encoder",
        "dots3_note.Dots3NoteVisionTopKRouter",
        ({"router_scaling_factor": 1.5, "mlp_layer_types": ["sparse"] * 42, "adapter_in_dim": H},),
        with_bias,
        ordered=False,
    ),
    Case(
        "muse_spark_text",
        "muse_spark.MuseSparkTopkRouter",
        ({"output_multiplier": 0.3, "routed_scaling_factor": 2.5},),
        read=linear,
        ordered=False,
    ),
    Case(
        "inkling2_text",
        "inkling2.Inkling2TopKRouter",
        ({"scoring_func": "sigmoid", "route_scale": 2.5}, {"scoring_func": "sqrtsoftplus"}),
        ordered=False,
    ),
    Case(
        "inkling2_loop_text",
        "inkling2_loop.Inkling2LoopTopKRouter",
        ({"scoring_func": "sigmoid", "route_scale": 2.5}, {"scoring_func": "sqrtsoftplus"}),
        ordered=False,
    ),
    Case(
        "deepseek_v4",
        "deepseek_v4.DeepseekV4TopKRouter",
        (
            {"scoring_func": "sqrtsoftplus"},
            {"scoring_func": "sigmoid", "routed_scaling_factor": 2.5},
        ),
        ordered=False,
    ),
    Case(
        "deepseek_v4_hash",
        "deepseek_v4.DeepseekV4HashRouter",
        (
            {"routed_scaling_factor": 2.5, "vocab_size": VOCABULARY},
            {"scoring_func": "sigmoid", "vocab_size": VOCABULARY},
        ),
        with_token_ids,
        config="deepseek_v4",
    ),
    Case("flint", "flint.FlintTopKRouter", NORM),
    Case("llama4_text", "llama4.Llama4Router", read=llama),
    Case(
        "phimoe",
        "phimoe.PhimoeTopKRouter",
        ({"num_experts_per_tok": 2, "router_jitter_noise": 0.2},),
    ),
    Case("kolibri1", "kolibri1.Kolibri1TopKRouter", NORM),
)
HERE = tuple(case for case in CASES if (case.config or case.model) in CONFIG_MAPPING)
"""The cases of which this transformers has the configuration; an older one has fewer models."""
ONE_VALUE = {"phimoe": {"num_experts_per_tok"}, "zaya": {"num_experts_per_tok"}}
"""Attributes of which transformers' class knows one value only."""
BY_MODEL = {case.model: case for case in CASES}
FROM_ELSEWHERE = {"interns1_pro", "interns1_pro_text"}
"""No class of transformers routes like them.

``test_models.py`` holds them against the formula of vLLM.
"""


def configured(case, said):
    """Build the configuration with tiny sizes.

    They go by the attribute names that the preset reads.
    """
    names = MODELS[case.model].reads
    first = {
        name: names[name] if isinstance(names[name], str) else names[name][0]
        for name in ("num_experts", "topk")
    }
    sizes = {"hidden_size": H, "num_attention_heads": 4, "num_key_value_heads": 4}
    values = {**sizes, first["num_experts"]: E, first["topk"]: K, **said}
    for path in [name for name in values if "." in name]:
        part, name = path.split(".")
        values[part] = {name: values.pop(path)} | values.get(part, {})
    return CONFIG_MAPPING[case.config or case.model](**values)


def built(case, config):
    """Build the router with random weights, biases, scales and tables.

    Each of them changes the outcome.
    """
    folder, name = case.router.split(".")
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    arguments = (H, E, K) if case.model == "jetmoe" else (config, *case.layer)
    router = getattr(module, name)(*arguments).eval().requires_grad_(requires_grad=False)
    randomize(router, case.bias)
    return router


def randomize(module, bias=(-0.3, 0.3)):
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if name.endswith("per_expert_scale"):
            tensor.data.uniform_(0.5, 1.5)
        elif name.endswith("tid2eid"):
            tensor.copy_(torch.rand(len(tensor), E).topk(tensor.shape[1], dim=-1).indices)
        elif name.endswith(("correction_bias", "balancing_biases")):
            tensor.data.uniform_(*bias)
        elif tensor.is_floating_point():
            tensor.data.normal_(0.0, 1.5 * tensor.shape[-1] ** -0.5)


def operands(router, arguments, spec):
    """Take the operands of the maths from where the model keeps them."""
    found = {}
    if spec.needs_bias:
        home = getattr(router, "moe_statics", router)
        own = getattr(home, "e_score_correction_bias", getattr(home, "balancing_biases", None))
        bias = arguments[1] if len(arguments) > 1 else own
        found["bias"] = torch.zeros(E) if bias is None else bias.flatten()
    if spec.per_expert_scale:
        found["per_expert_scale"] = router.per_expert_scale
    if spec.selection == "token_table":
        found["token_ids"] = arguments[1].flatten()
        found["expert_table"] = router.tid2eid
    return found


def dense(weights, ids, num_experts):
    return torch.zeros(len(ids), num_experts, dtype=weights.dtype).scatter(1, ids.long(), weights)


def assert_same(theirs, ours, *, ordered, zero_experts=0):
    """Compare ids, and the weights of each expert.

    Ids are compared as sets where transformers leaves them unsorted.
    """
    weights, ids = ours
    assert len(ids.unique(dim=0)) > 1  # else a bias alone decided
    num_experts = theirs.logits.shape[1]
    mine, its = (
        (ids.long(), theirs.ids.long())
        if ordered
        else (ids.long().sort().values, theirs.ids.long().sort().values)
    )
    assert torch.equal(mine, its)
    their_weights = theirs.weights.masked_fill(
        theirs.ids >= num_experts - zero_experts, 0.0
    )  # LongCat scales identities
    torch.testing.assert_close(
        dense(weights.float(), ids, num_experts),
        dense(their_weights.float(), theirs.ids, num_experts),
        rtol=1e-5,
        atol=1e-8,
    )


def routing_of(case, config):
    """Read the configuration as a user would.

    A name that transformers lacks is put over its configuration's dict.
    """
    return from_config({**config.to_dict(), "model_type": case.model} if case.config else config)


PARAMETERS = [
    pytest.param(case, said, id=f"{case.model}-{index}")
    for case in HERE
    for index, said in enumerate(case.settings)
]


@pytest.mark.parametrize(("case", "said"), PARAMETERS)
def test_preset_routes_as_the_router_of_transformers(case, said):
    torch.manual_seed(sum(map(ord, case.model)))
    config = configured(case, said)
    routing = routing_of(case, config)
    router = built(case, config)
    arguments = case.arguments(torch.randn(T, H), torch.empty(E).uniform_(-0.3, 0.3))
    theirs = case.read(router, arguments, router(*arguments))
    if case.factor:
        theirs = theirs._replace(weights=theirs.weights * getattr(config, case.factor))
    assert routing.model == case.model
    assert theirs.logits.shape == (T, routing.num_experts)
    ours = oracle.route(
        routing.spec, theirs.logits, routing.topk, **operands(router, arguments, routing.spec)
    )
    assert_same(
        theirs, ours, ordered=case.ordered, zero_experts=getattr(config, "zero_expert_num", 0)
    )


def divides(spec):
    """Whether weights are divided by a sum that may be tiny.

    The sum of softmax scores, or of scores of capped logits, is not.
    """
    return spec.renormalize and spec.score != "softmax" and spec.logit_softcap is None


def may_divide(preset):
    said = [changes for options in preset.choices.values() for changes in options.values()]
    scores = {preset.spec.score, *(changes.get("score", "softmax") for changes in said)}
    return scores != {"softmax"} and (preset.spec.renormalize or "renormalize" in preset.reads)


@pytest.mark.parametrize(
    "case", [case for case in HERE if may_divide(MODELS[case.model])], ids=lambda case: case.model
)
def test_preset_has_the_epsilon_of_its_router_or_none_which_shows_where_all_scores_are_tiny(case):
    configs = [configured(case, said) for said in case.settings]
    dividing = [config for config in configs if divides(routing_of(case, config).spec)]
    assert dividing
    for config in dividing:
        torch.manual_seed(0)
        routing = routing_of(case, config)
        spec = routing.spec
        router = built(case, config)
        getattr(router, "gate", router).weight.data[:, 0] = 1.0
        hidden = torch.randn(T, H)
        # Every score is about the epsilon, which is then half of the sum (or as near to it as
        # float32 can be).
        epsilon = spec.renorm_epsilon or 1e-20
        tiny = math.log(epsilon) * (1.8 if spec.score == "sqrtsoftplus" else 1.0)
        hidden[:, 0] = tiny / spec.logit_multiplier
        arguments = case.arguments(hidden, torch.empty(E).uniform_(*case.bias))
        theirs = case.read(router, arguments, router(*arguments))
        given = operands(router, arguments, spec)
        ours = oracle.route(spec, theirs.logits, routing.topk, **given)
        factor = getattr(config, case.factor) if case.factor else 1.0
        their_sum, our_sum = theirs.weights.sum(-1) * factor, ours.weights.sum(-1).float()
        torch.testing.assert_close(their_sum, our_sum, rtol=1e-5, atol=0.0)
        another = spec.replace(renorm_epsilon=0.0 if spec.renorm_epsilon else epsilon)
        others = oracle.route(another, theirs.logits, routing.topk, **given)
        assert (others.weights.sum(-1).float() / our_sum - 1).abs().max() > 1e-3


def test_every_epsilon_is_tried_where_all_scores_are_tiny():
    with_epsilon = [case.model for case in HERE if MODELS[case.model].spec.renorm_epsilon]
    assert with_epsilon
    assert [model for model in with_epsilon if not may_divide(MODELS[model])] == []


def value_at(said, names):
    """Return what a configuration's dict says under the first of the names that is there.

    A name may be a dotted path.
    """
    paths = [names] if isinstance(names, str) else names
    for path in paths:
        value = said
        for name in path.split("."):
            value = value.get(name, KeyError) if isinstance(value, dict) else KeyError
        if value is not KeyError:
            return value
    raise KeyError(names)


@pytest.mark.parametrize("case", HERE, ids=lambda case: case.model)
def test_every_attribute_that_a_preset_reads_is_tried_with_another_value_than_the_default(case):
    preset = MODELS[case.model]
    default = CONFIG_MAPPING[case.config or case.model]().to_dict()
    tried = [configured(case, said).to_dict() for said in case.settings]
    one_value = {
        name for name, options in preset.choices.items() if len(options) == 1
    } | ONE_VALUE.get(case.model, set())
    read = {*preset.reads.values(), *preset.choices} - one_value
    assert read
    for names in read:
        assert any(value_at(said, names) != value_at(default, names) for said in tried), names


COPIES = {"granitemoe_swa", "granitemoehybrid", "granitemoeshared", "kimi_k2"}


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.model not in COPIES], ids=lambda case: case.model
)
def test_the_source_of_a_preset_names_the_class_that_it_is_proven_against(case):
    assert re.search(rf"\b{case.router.rpartition('.')[2]}\b", MODELS[case.model].source)


def test_the_installed_transformers_has_every_model_of_the_cases():
    """``HERE`` is shorter only with the oldest transformers.

    ``make transformers-check`` installs it, and does not run this file.
    """
    assert [case.model for case in CASES if case not in HERE] == []


def test_every_preset_is_proven_under_its_own_name_or_its_text_models():
    unproven = set(MODELS) - set(BY_MODEL) - FROM_ELSEWHERE
    assert {
        name
        for name in unproven
        if not any(MODELS[name].spec == MODELS[text].spec for text in BY_MODEL)
    } == set()


SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": H,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
WHOLE = {
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": E,
        "top_k_experts": K,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 0,
        "global_head_dim": 16,
        "num_kv_shared_layers": 0,
    },
    "mixtral": {"num_local_experts": E, "num_experts_per_tok": K},
    "qwen2_moe": {
        "num_experts": E,
        "num_experts_per_tok": K,
        "shared_expert_intermediate_size": 16,
    },
    "qwen3_moe": {"num_experts": E, "num_experts_per_tok": K, "norm_topk_prob": True},
    "olmoe": {"num_experts": E, "num_experts_per_tok": K},
    "gpt_oss": {"num_local_experts": E, "num_experts_per_tok": K},
    "deepseek_v2": {
        "n_routed_experts": E,
        "num_experts_per_tok": K,
        "n_group": 4,
        "topk_group": 2,
        **LATENT,
    }
    | {
        "topk_method": "group_limited_greedy",
        "num_key_value_heads": 4,
        "routed_scaling_factor": 16.0,
    },
    "deepseek_v3": {
        "n_routed_experts": E,
        "num_experts_per_tok": K,
        "n_group": 4,
        "topk_group": 2,
        **LATENT,
    }
    | {"num_key_value_heads": 4, "first_k_dense_replace": 0},
    "llama4_text": {"num_local_experts": E, "num_experts_per_tok": 2, "intermediate_size_mlp": 32},
    "phimoe": {"num_local_experts": E, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": E, "num_experts_per_tok": K},
    "ernie4_5_moe": {"moe_num_experts": E, "moe_k": K, "moe_layer_start_index": 0},
    "minimax_m2": {"num_local_experts": E, "num_experts_per_tok": K},
    "glm4_moe": {"n_routed_experts": E, "num_experts_per_tok": K, "first_k_dense_replace": 0},
}


@pytest.mark.parametrize("model_type", WHOLE)
@torch.no_grad()
def test_router_made_from_a_models_configuration_routes_every_layer_as_the_model_did(model_type):
    torch.manual_seed(sum(map(ord, model_type)))
    case = BY_MODEL[model_type]
    model = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING[model_type](**SMALL | WHOLE[model_type])
    ).eval()
    routers = [
        module
        for module in model.modules()
        if type(module).__name__ == case.router.rpartition(".")[2]
    ]
    calls = []
    for router in routers:
        randomize(router, case.bias)
        router.register_forward_hook(
            lambda module, args, output: calls.append((module, args, output))
        )
    model(input_ids=torch.randint(3, VOCABULARY, (2, 16)))
    assert len(calls) == len(routers) > 0
    route = moe_routing.get_router(model.config)
    for router, args, output in calls[:]:
        theirs = case.read(router, args, output)
        ours = route(theirs.logits, **operands(router, args, route.spec))
        assert_same(theirs, ours, ordered=case.ordered)


BLOCKS = {
    "beam": "BeamMoE",
    "laguna": "LagunaSparseMoeBlock",
    "minimax_m3_vl_text": "MiniMaxM3VLSparseMoeBlock",
    "openai_privacy_filter": "OpenAIPrivacyFilterMLP",
    "step3p5": "Step3p7SparseMoeBlock",
}


class Weigher(nn.Module):
    """A stand-in for the experts.

    Every expert returns 1, so the block returns the sum of the weights that it applied.
    """

    def forward(self, hidden, _ids, weights):
        return weights.sum(-1, keepdim=True).expand_as(hidden)


class Nothing(nn.Module):
    """Stands in for the shared experts."""

    def forward(self, hidden):
        return torch.zeros_like(hidden)


@pytest.mark.parametrize("model", BLOCKS)
@torch.no_grad()
def test_weights_hold_the_factor_by_which_the_models_block_scales_its_experts(model):
    torch.manual_seed(0)
    case = BY_MODEL[model]
    config = configured(case, case.settings[0])
    folder, _ = case.router.split(".")
    block_class = getattr(
        importlib.import_module(f"transformers.models.{folder}.modeling_{folder}"), BLOCKS[model]
    )
    block = (block_class(config, 0) if model == "step3p5" else block_class(config)).eval()
    randomize(block)
    block.experts, block.shared_experts = Weigher(), Nothing()
    router = next(
        module
        for module in block.modules()
        if type(module).__name__ == case.router.rpartition(".")[2]
    )
    hidden = torch.randn(1, T, H)
    output = block(hidden)
    applied = (output[0] if isinstance(output, tuple) else output).view(T, H)[:, 0]
    args = (hidden.view(T, H),)
    theirs = case.read(router, args, router(*args))
    routing = routing_of(case, config)
    weights, _ = oracle.route(
        routing.spec, theirs.logits, routing.topk, **operands(router, args, routing.spec)
    )
    torch.testing.assert_close(weights.sum(-1).float(), applied, rtol=1e-5, atol=1e-8)


def test_every_case_with_a_factor_has_its_block_tested():
    assert {case.model for case in CASES if case.factor} == set(BLOCKS)
