"""Model presets: complete against transformers' own list, and true to its defaults.

They are strict about configurations.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig

import moe_routing
from moe_routing.families import FAMILIES
from moe_routing.models import MODELS, NOT_EXPRESSED, from_config
from moe_routing.reference import oracle
from moe_routing_registry import UnknownNameError

FOLDERS = Path(transformers.__file__).parent / "models"
BAILING = {name for name in MODELS if name.startswith("bailing_moe")}
NOT_IN_TRANSFORMERS = {"deepseek_v4_hash", "interns1_pro", "interns1_pro_text", "kimi_k2"} | BAILING
OTHER_DEFAULTS = {"kimi_k25"}
"""Presets that follow a released configuration.

transformers' class has a text model of its choice.
"""
REQUIRED = {
    "deepseek_ocr2_text": {"num_experts_per_tok": 6},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "diffusion_gemma_text": {"num_experts": 128, "top_k_experts": 8},
    "dots1": {"n_routed_experts": 128, "num_experts_per_tok": 6},
    "dots3_note_vision_encoder": {"mlp_layer_types": ["dense"] * 42},
    "gemma4_text": {"enable_moe_block": True, "num_experts": 128, "top_k_experts": 8},
}
"""Arguments that a configuration class needs for a router, or for the same one in all layers."""
TEXT_OF = {name: f"{name}_text" for name in MODELS if f"{name}_text" in MODELS} | {
    "nemotron_h_omni": "nemotron_h",
    "qwen3_omni_moe_thinker": "qwen3_omni_moe_text",
    "step3p7": "step3p5",
}
"""Models of several parts, and the part that has the router."""
PARTS = sorted(set(MODELS) - NOT_IN_TRANSFORMERS - OTHER_DEFAULTS - set(TEXT_OF))


def default(name):
    return CONFIG_MAPPING[name](**REQUIRED.get(name, {}))


def said(name):
    """Return a configuration of that name as a plain dict, released ones included."""
    if name in CONFIG_MAPPING and name not in OTHER_DEFAULTS:
        return default(name).to_dict()
    if name == "deepseek_v4_hash":
        return {**default("deepseek_v4").to_dict(), "model_type": name}
    if name in BAILING:
        return (
            LING | {"model_type": name} if name == "bailing_moe" else LING_2 | {"model_type": name}
        )
    if name.startswith("kimi"):
        kimi = {
            "model_type": name,
            "n_routed_experts": 384,
            "num_experts_per_tok": 8,
            "routed_scaling_factor": 2.827,
        }
        return (
            kimi
            | {"norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
            | {"n_group": 1, "topk_group": 1}
        )
    return {
        "model_type": name,
        "num_experts": 512,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "router_n_groups": 8,
    }


def without(config, path):
    """Return a copy of a dict without the item at a dotted path."""
    name, _, rest = path.partition(".")
    return {
        key: without(value, rest) if rest and key == name else value
        for key, value in config.items()
        if rest or key != name
    }


@pytest.mark.parametrize("name", PARTS)
def test_preset_has_the_defaults_of_the_configuration_class(name):
    routing = from_config(default(name))
    preset = MODELS[name]
    sizes = {} if name in REQUIRED else {"num_experts": preset.num_experts, "topk": preset.topk}
    assert routing._asdict() == routing._asdict() | {"model": name, "spec": preset.spec} | sizes


@pytest.mark.parametrize("name", sorted({"kimi_k2", "kimi_k25", "interns1_pro_text"}))
def test_preset_has_the_values_of_the_released_configuration(name):
    preset = MODELS[name]
    assert from_config(said(name)) == (name, preset.spec, preset.num_experts, preset.topk)


@pytest.mark.parametrize("name", PARTS)
def test_a_dict_is_read_as_its_object(name):
    assert from_config(default(name).to_dict()) == from_config(default(name))


@pytest.mark.parametrize("name", TEXT_OF)
def test_a_model_of_several_parts_has_the_preset_of_its_text_model(name):
    preset, text = MODELS[name], MODELS[TEXT_OF[name]]
    assert (preset.spec, preset.reads, preset.choices, preset.source) == (
        text.spec,
        text.reads,
        text.choices,
        text.source,
    )


@pytest.mark.parametrize(
    "name",
    sorted(
        set(TEXT_OF) - NOT_IN_TRANSFORMERS - {name for name in TEXT_OF if TEXT_OF[name] in REQUIRED}
    ),
)
def test_the_configuration_of_a_model_of_several_parts_is_read_in_its_text_model(name):
    assert from_config(CONFIG_MAPPING[name]()) == from_config(CONFIG_MAPPING[TEXT_OF[name]]())


@pytest.mark.parametrize("name", PARTS)
def test_every_attribute_that_a_preset_reads_must_be_there(name):
    config = said(name)
    preset = MODELS[name]
    fixed = {
        field
        for options in preset.choices.values()
        for changes in options.values()
        for field in changes
    }
    required = [
        *(n for n in preset.choices if n not in preset.defaults),
        *(names for field, names in preset.reads.items() if field not in fixed),
    ]
    assert required
    for names in required:
        paths = [names] if isinstance(names, str) else names
        left = config
        for path in paths:
            left = without(left, path)
        with pytest.raises(ValueError, match=re.escape(paths[0])):
            from_config(left)


def moe_configuration_classes():
    """Find every configuration class of transformers that mentions experts, by folder."""
    for folder in sorted(FOLDERS.iterdir()):
        sources = [path.read_text() for path in folder.glob("configuration_*.py")]
        if not any("expert" in source for source in sources):
            continue
        for path in folder.glob("configuration_*.py"):
            module = importlib.import_module(f"transformers.models.{folder.name}.{path.stem}")
            for value in vars(module).values():
                if not (
                    isinstance(value, type)
                    and issubclass(value, PretrainedConfig)
                    and value.__module__ == module.__name__
                ):
                    continue
                names = {*getattr(value, "__dataclass_fields__", {}), *(value.attribute_map or {})}
                if value.model_type and any("expert" in name for name in names):
                    yield folder.name, value.model_type


def test_no_model_type_of_transformers_with_experts_is_forgotten():
    found = {model_type for _, model_type in moe_configuration_classes()} | {
        "dbrx"
    }  # whose experts are in a nested part
    assert found - set(MODELS) - set(NOT_EXPRESSED) == set()
    assert len(found) > 60


def test_no_modeling_file_of_transformers_that_calls_experts_is_forgotten():
    calling = {
        folder.name
        for folder in FOLDERS.iterdir()
        for path in folder.glob("modeling_*.py")
        if "self.experts(" in path.read_text()
    }
    known = {
        folder
        for folder, model_type in moe_configuration_classes()
        if model_type in {*MODELS, *NOT_EXPRESSED}
    }
    assert calling - known - {"dbrx"} == set()
    assert len(calling) > 60


def test_every_model_that_is_not_expressed_is_one_of_transformers_and_has_its_reason():
    assert set(NOT_EXPRESSED) <= set(CONFIG_MAPPING)
    assert set(NOT_EXPRESSED).isdisjoint(MODELS)
    assert [name for name, reason in NOT_EXPRESSED.items() if not reason] == []
    assert NOT_EXPRESSED


@pytest.mark.parametrize("name", ["deepseek_v3", "gemma4", "gpt_oss", "llama4", "phimoe"])
def test_every_preset_is_a_router_by_its_name(name):
    assert moe_routing.get_router(name).spec == MODELS[name].spec


def test_gemma4s_router_is_read_from_its_text_model():
    config = CONFIG_MAPPING["gemma4"](
        text_config={"enable_moe_block": True, "num_experts": 16, "top_k_experts": 4}
    )
    assert from_config(config) == ("gemma4_text", FAMILIES["gemma4"].spec, 16, 4)


def test_qwen3_omnis_thinker_is_read_and_its_talker_on_request():
    config = CONFIG_MAPPING["qwen3_omni_moe"]()
    assert from_config(config).model == "qwen3_omni_moe_text"
    assert from_config(config.talker_config.text_config).model == "qwen3_omni_moe_talker_text"


def test_a_text_model_without_a_type_of_its_own_is_read_as_its_parents():
    config = {
        "model_type": "llama4",
        "text_config": {"num_local_experts": 16, "num_experts_per_tok": 1},
    }
    assert from_config(config) == ("llama4", MODELS["llama4"].spec, 16, 1)


def test_zero_experts_are_among_the_columns_of_the_logits():
    assert from_config(default("longcat_flash")).num_experts == 512 + 256


def test_deepseek_v4s_hashed_layers_are_read_from_the_same_configuration():
    routing = from_config(said("deepseek_v4_hash"))
    assert (routing.spec.selection, routing.spec.scale) == ("token_table", 1.5)


def test_layers_that_differ_are_refused_as_a_whole_and_read_one_by_one():
    config = CONFIG_MAPPING["mixtral"](
        num_hidden_layers=3, per_layer_config={1: {"num_local_experts": 4}}
    )
    for whole in (config, config.to_dict()):
        with pytest.raises(
            ValueError,
            match=r"^num_local_experts: expected one value for all layers.*per_layer_config\[i\]",
        ):
            from_config(whole)
    assert from_config(config.per_layer_config[1]).num_experts == 4


def test_a_list_that_differs_by_layer_is_refused():
    config = said("hunyuan_v1_moe") | {"num_experts": 16, "moe_topk": [2, 4]}
    with pytest.raises(ValueError, match=r"^moe_topk: expected an integer >= 1, got \[2, 4\]$"):
        from_config(config)


def test_numpys_scalars_are_read_as_pythons():
    numbers = {
        "n_group": np.int64(8),
        "topk_group": np.int32(4),
        "routed_scaling_factor": np.float32(2.5),
    }
    assert from_config(said("deepseek_v3") | numbers) == from_config(said("deepseek_v3"))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "deepseek_v3",
            {"routed_scaling_factor": 10**400},
            r"^routed_scaling_factor: expected a finite number, got 1000+",
        ),
        (
            "mixtral",
            {"num_local_experts": 0},
            r"^num_local_experts: expected an integer >= 1, got 0$",
        ),
        (
            "mixtral",
            {"num_local_experts": None},
            r"^num_local_experts: expected an integer >= 1, got None$",
        ),
        (
            "mixtral",
            {"num_local_experts": 8.0},
            r"^num_local_experts: expected an integer >= 1, got 8\.0$",
        ),
        (
            "mixtral",
            {"num_experts_per_tok": True},
            r"^num_experts_per_tok: expected an integer >= 1, got True$",
        ),
        (
            "mixtral",
            {"num_experts_per_tok": 9},
            (
                r"^topk: expected 1 <= topk <= num_experts \(8\), got 9; "
                r"read from .*num_experts_per_tok"
            ),
        ),
        (
            "qwen3_moe",
            {"norm_topk_prob": "yes"},
            r"^norm_topk_prob: expected True or False, got 'yes'$",
        ),
        (
            "longcat_flash",
            {"zero_expert_num": -1},
            r"^zero_expert_num: expected an integer >= 0, got -1$",
        ),
        (
            "deepseek_v3",
            {"routed_scaling_factor": float("nan")},
            r"^routed_scaling_factor: expected a finite number, got nan$",
        ),
        (
            "deepseek_v3",
            {"n_group": 7},
            r"^num_groups: expected a divisor of num_experts \(256\), got 7; .*num_groups=n_group",
        ),
        (
            "deepseek_v3",
            {"topk_group": 9},
            r"^topk_groups: expected 1 <= .*, got 9; read from .*topk_groups=topk_group",
        ),
        (
            "deepseek_v3",
            {"n_group": 128, "topk_group": 2},
            r"^topk: expected at most topk_groups \* .* = 4, got 8; read from ",
        ),
        (
            "deepseek_v2",
            {"topk_method": "noaux_tc"},
            r"^topk_method: expected 'greedy' or 'group_limited_greedy' .*'noaux_tc'$",
        ),
        (
            "deepseek_v2",
            {"norm_topk_prob": True},
            r"^norm_topk_prob: expected False in a configuration of 'deepseek_v2', got True$",
        ),
        (
            "deepseek_v4",
            {"scoring_func": "gelu"},
            r"^scoring_func: expected 'sqrtsoftplus' or 'sigmoid' .*got 'gelu'$",
        ),
        (
            "gemma4_text",
            {"enable_moe_block": False},
            r"^enable_moe_block: expected True .*got False$",
        ),
        (
            "laguna",
            {"moe_router_logit_softcapping": -1.0},
            r"^logit_softcap: .*logit_softcap=moe_router_logit_softcapping",
        ),
        (
            "dbrx",
            {"ffn_config": {"moe_normalize_expert_weights": 2}},
            r"^ffn_config.moe_normalize_expert_weights: expected 1 or None",
        ),
        (
            "interns1_pro",
            {"num_experts_per_tok": 12},
            r"^topk: expected a multiple of num_groups \(8\), got 12; ",
        ),
    ],
)
def test_an_impossible_value_is_refused_and_its_attribute_named(name, changes, message):
    with pytest.raises(ValueError, match=message):
        from_config(said(name) | changes)


CONTRADICTIONS = [
    ("deepseek_v3", "scoring_func", "softmax", "'sigmoid'"),
    ("deepseek_v3", "topk_method", "greedy", "'noaux_tc'"),
    ("glm4_moe", "scoring_func", "softmax", "'sigmoid'"),
    ("minimax_m2", "scoring_func", "softmax", "'sigmoid'"),
    ("minimax_m2", "use_routing_bias", False, "True"),
    ("minimax_m2", "norm_topk_prob", False, "True"),
    ("minimax_m2", "routed_scaling_factor", 2.5, "1.0"),
    ("minimax_m2", "n_group", 8, "1"),
    ("deepseek_v2", "scoring_func", "sigmoid", "'softmax'"),
    ("deepseek_ocr2_text", "norm_topk_prob", True, "False"),
    ("afmoe", "route_norm", False, "True"),
    ("afmoe", "score_func", "softmax", "'sigmoid'"),
    ("afmoe", "num_expert_groups", 4, "1"),
    ("step3p5", "norm_expert_weight", False, "True"),
    ("step3p5", "moe_router_activation", "softmax", "'sigmoid'"),
    ("step3p5", "use_moe_router_bias", False, "True"),
    ("kimi_linear", "moe_router_activation_func", "softmax", "'sigmoid'"),
    ("qwen3_5_moe_text", "norm_topk_prob", False, "True"),
    ("qwen3_moe", "routed_scaling_factor", 2.5, "1.0"),
    ("qwen3_moe", "scoring_func", "sigmoid", "'softmax'"),
    ("mixtral", "norm_topk_prob", False, "True"),
    ("jamba", "norm_topk_prob", True, "False"),
    ("gpt_oss", "scoring_func", "sigmoid", "'softmax'"),
    ("deepseek_v4", "topk_method", "greedy", "'noaux_tc'"),
    ("longcat_flash", "zero_expert_type", "drop", "'identity'"),
    ("ernie4_5_moe", "moe_gate_act", "sigmoid", "'softmax'"),
]


@pytest.mark.parametrize(("name", "attribute", "value", "expected"), CONTRADICTIONS)
def test_a_setting_that_a_preset_would_not_follow_is_refused_by_name(
    name, attribute, value, expected
):
    preset = re.escape(MODELS[name].spec.formula.partition(";")[0][:8])
    message = (
        rf"^{attribute}: expected {expected} in a configuration of '{name}', "
        rf"whose preset computes {preset}.*got {value!r}$"
    )
    with pytest.raises(ValueError, match=message):
        from_config(said(name) | {attribute: value})


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_preset_refuses_another_score_another_renormalisation_and_another_scale(name):
    config = (
        said(name) | REQUIRED.get(name, {})
        if name in NOT_IN_TRANSFORMERS | OTHER_DEFAULTS
        else said(name)
    )
    if name in TEXT_OF and name not in NOT_IN_TRANSFORMERS | OTHER_DEFAULTS:
        config = said(TEXT_OF[name]) | {"model_type": name}
    spec = from_config(config).spec
    read = {
        *MODELS[name].choices,
        *(
            n
            for names in MODELS[name].reads.values()
            for n in ([names] if isinstance(names, str) else names)
        ),
    }
    other = {
        "score_function": "sigmoid" if spec.score == "softmax" else "softmax",
        "route_norm": not spec.renormalize,
        "moe_router_scaling_factor": spec.scale + 1.0,
        "use_routing_bias": not spec.needs_bias,
    }
    agreeing = {
        "score_function": spec.score,
        "route_norm": spec.renormalize,
        "moe_router_scaling_factor": spec.scale,
        "use_routing_bias": spec.needs_bias,
    }
    assert from_config(config | {n: v for n, v in agreeing.items() if n not in read}).spec == spec
    for attribute in other.keys() - read:
        with pytest.raises(ValueError, match=f"^{attribute}: expected "):
            from_config(config | {attribute: other[attribute]})


@pytest.mark.parametrize("part", ["text_config", "llm_config", "language_config", "thinker_config"])
def test_the_text_model_is_found_in_every_usual_part(part):
    mixtral = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    assert from_config({"model_type": "somebodys_vision_model", part: mixtral}) == from_config(
        mixtral
    )
    assert from_config({"model_type": "outer", "text_config": None, part: mixtral}) == from_config(
        mixtral
    )


LING = {
    "model_type": "bailing_moe",
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}
LING_2 = LING | {
    "score_function": "sigmoid", "moe_router_enable_expert_bias": True, "n_group": 8,
    "topk_group": 4, "routed_scaling_factor": 2.5,
}  # fmt: skip


def test_ling_1_takes_a_softmax_and_ling_2_a_sigmoid_under_the_same_name():
    first, second = from_config(LING), from_config(LING_2)
    assert first.spec == MODELS["mixtral"].spec
    assert second.spec == MODELS["deepseek_v3"].spec
    assert (second.num_experts, second.topk) == (256, 8)
    assert from_config(LING_2 | {"n_group": 1, "topk_group": 1}).spec == MODELS[
        "kimi_k2"
    ].spec.replace(scale=2.5)
    for refused in ({"score_function": "gelu"}, {"moe_router_enable_expert_bias": False}):
        with pytest.raises(ValueError, match=f"^{next(iter(refused))}: expected "):
            from_config(LING_2 | refused)


@pytest.mark.parametrize("name", sorted(BAILING - {"bailing_moe"}))
def test_every_ling_2_and_ring_2_is_read(name):
    assert from_config(LING_2 | {"model_type": name}).spec == MODELS["deepseek_v3"].spec


def test_an_unknown_model_type_is_refused_with_near_matches():
    with pytest.raises(
        UnknownNameError, match="unknown model_type 'mixtrall': did you mean 'mixtral'"
    ):
        from_config({"model_type": "mixtrall"})


def test_a_model_that_cannot_be_expressed_is_refused_with_the_reason():
    with pytest.raises(
        ValueError, match=r"^model_type: the routing of 'doge' cannot be expressed: .*product keys"
    ):
        from_config(CONFIG_MAPPING["doge"]())


@pytest.mark.parametrize("config", [None, 3, {}, {"num_experts": 8}, {"model_type": 7}])
def test_what_is_no_configuration_is_a_type_error(config):
    with pytest.raises(
        TypeError, match=r"^config: expected an object or dict with a model_type, got "
    ):
        from_config(config)


@pytest.mark.parametrize("renormalize", [True, False])
def test_interns1_pro_routes_by_the_formula_of_vllm(renormalize):
    torch.manual_seed(0)
    config = said("interns1_pro") | {
        "num_experts": 32,
        "norm_topk_prob": renormalize,
        "router_n_groups": 4,
    }
    routing = from_config(config)
    logits = torch.randn(64, 32)
    best = logits.softmax(-1).view(64, 4, 8).topk(2, dim=-1)
    ids = (best.indices + torch.arange(0, 32, 8)[:, None]).flatten(1)
    weights = best.values.flatten(1)
    weights = weights / weights.sum(-1, keepdim=True) if renormalize else weights
    ours = oracle.route(routing.spec, logits, routing.topk)
    expected = torch.zeros(64, 32).scatter(1, ids, weights)
    torch.testing.assert_close(
        torch.zeros(64, 32).scatter(1, ours.ids, ours.weights.float()), expected
    )
