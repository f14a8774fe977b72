"""Every router of transformers that a preset is proven against.

Its own code and ours run on the same input.
"""

from __future__ import annotations

import ast
import inspect
import runpy
import textwrap
import types
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moe_routing import MoeRoutingWarning
from moe_routing.integrations.transformers import patch, unpatch
from moe_routing.integrations.transformers._patch import install
from moe_routing.integrations.transformers._proof import known
from moe_routing.integrations.transformers._recipes import RECIPES
from moe_routing.models import MODELS

AGAINST = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("against.py"))))
parts, in_order_of_ids, assert_same = (
    AGAINST.parts,
    AGAINST.in_order_of_ids,
    AGAINST.assert_same_items,
)
HERE = [
    pytest.param(case, said, id=f"{case.model}-{index}")
    for case in AGAINST.CASES
    if AGAINST.is_here(case)  # an older transformers has fewer models
    for index, said in enumerate(case.settings)
]
LEFT = [parameters for parameters in HERE if parameters.id in {"axk2-0", "axk2-1"}]
REPLACED = [parameters for parameters in HERE if parameters not in LEFT]
KEPT_IN_FLOAT32 = {"inkling2_text", "inkling2_loop_text"}
"""Models that keep their router's weights in float32, whatever the model's dtype."""
TRAINED = [
    parameters
    for parameters in REPLACED
    if parameters.id.endswith("-0") or parameters.id == "axk2-3"
]
pytestmark = pytest.mark.usefixtures("one_thread")


def made(case, said, dtype=torch.float32):
    """Build a router; return it, its arguments, and a function that calls it as its block does."""
    torch.manual_seed(sum(map(ord, case.model)))
    router = AGAINST.built(case, AGAINST.configured(case, said))
    if case.model not in KEPT_IN_FLOAT32:
        router.to(dtype)
    hidden, bias = (
        torch.randn(AGAINST.T, AGAINST.H, dtype=dtype),
        torch.empty(AGAINST.E).uniform_(-0.3, 0.3),
    )
    arguments = case.arguments(hidden.requires_grad_(), bias)

    def call():
        if case.model == "dbrx":
            return router.route_tokens_to_experts(router.router(arguments[0]))
        return router(*arguments)

    return router, hidden, call


@pytest.mark.parametrize(("case", "said"), REPLACED)
@torch.no_grad()
def test_replaced_router_returns_what_its_own_code_returns(case, said):
    router, _, call = made(case, said)
    theirs = call()
    assert patch(router).left == ()
    assert_same(in_order_of_ids(call()), in_order_of_ids(theirs))
    unpatch(router)
    assert_same(call(), theirs)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "said"), REPLACED)
@torch.no_grad()
def test_replaced_router_keeps_places_and_dtypes_in_bfloat16(case, said):
    router, _, call = made(case, said, torch.bfloat16)
    theirs = call()
    patch(router)
    ours = call()
    described = [
        [
            (item.dtype, item.shape) if isinstance(item, torch.Tensor) else type(item)
            for item in output
        ]
        for output in (ours, theirs)
    ]
    assert described[0] == described[1]
    if parts(theirs)[1]:
        assert_same(
            parts(ours)[2], parts(theirs)[2]
        )  # logits or probabilities, to the bit of their linear


@pytest.mark.slow
@pytest.mark.parametrize(("case", "said"), TRAINED)
def test_gradients_are_those_of_its_own_code(case, said):
    router, hidden, call = made(case, said)
    router.requires_grad_()
    leaves = [
        hidden,
        *(parameter for parameter in router.parameters() if parameter.is_floating_point()),
    ]

    def gradients():
        items = in_order_of_ids(call())
        floats = [item for item in items if isinstance(item, torch.Tensor) and item.requires_grad]
        torch.manual_seed(0)
        loss = sum((item.float() * torch.randn(item.shape)).sum() for item in floats)
        return torch.autograd.grad(loss, leaves, allow_unused=True)

    theirs = gradients()
    assert any(its is not None and its.any() for its in theirs)
    patch(router)
    for mine, its in zip(gradients(), theirs, strict=True):
        assert (mine is None) == (its is None)
        if its is not None:
            torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("case", "said"), REPLACED)
def test_routing_read_from_a_router_is_that_of_the_preset(case, said):
    config = AGAINST.configured(case, said)
    expected = AGAINST.routing_of(case, config).spec
    spec, _ = install(made(case, said)[0])
    own = {
        "openai_privacy_filter": {"scale": 1 / AGAINST.K},  # which its block takes back
        "longcat_flash": {"zero_experts": 0},  # its block multiplies the identity by these weights
        "laguna": {"logit_softcap": None},  # returned with the cap, so routed with it
        "muse_spark_text": {"logit_multiplier": 1.0},  # likewise
    }
    assert spec == expected.replace(
        **({"scale": 1.0} if case.factor else {}) | own.get(case.model, {})
    )


OTHER_MATHS = {
    "family": lambda family: f"not_{family}",
    "score": lambda score: "sigmoid" if score == "softmax" else "softmax",
    "selection": lambda selection: (
        "logits" if selection == "logits_plus_bias" else "logits_plus_bias"
    ),
    "renormalize": lambda renormalize: not renormalize,
    "renorm_epsilon": lambda epsilon: epsilon + 0.25,
    "renorm_floor": lambda floor: floor + 0.25,
    "scale": lambda scale: scale + 1.0,
    "per_expert_scale": lambda scaled: not scaled,
    "logit_softcap": lambda cap: 2.0 if cap is None else None,
    "logit_multiplier": lambda multiplier: multiplier + 1.0,
    "group_sum": lambda best: best + 1,
    "jitter": lambda jitter: jitter + 0.25,
    "shared_experts": lambda experts: experts + 1,
    "zero_experts": lambda experts: experts + 1,
}


def changed(spec, field):
    """Return the spec with another value of that field, ``None`` where no other is possible."""
    try:
        return spec.replace(**{field: OTHER_MATHS[field](getattr(spec, field))})
    except ValueError:  # sparsemixer takes no other score, for example
        return None


def stating(preset, field, value):
    """Return the preset with another value wherever it states that field."""
    choices = {
        attribute: {
            option: said | {field: value} if field in said else said
            for option, said in options.items()
        }
        for attribute, options in preset.choices.items()
    }
    return replace(preset, spec=preset.spec.replace(**{field: value}), choices=choices)


@pytest.mark.parametrize(("case", "said"), REPLACED)
def test_a_router_computes_what_its_preset_states_and_nothing_of_its_own(case, said):
    router, _, _ = made(case, said)
    spec, recipe = install(router)
    settings = recipe.settings
    others = {
        field: changed(spec, field) for field in OTHER_MATHS.keys() - settings.preset.reads.keys()
    }
    assert len([other for other in others.values() if other]) >= 8
    for field, other in others.items():
        if other is not None:
            preset = stating(settings.preset, field, getattr(other, field))
            assert replace(settings, preset=preset).spec_of(router, None, recipe.topk) == other


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_names_the_preset_of_a_model_that_it_routes(name):
    routers = {path for path, recipes in known().items() if name in recipes.values()}
    preset = RECIPES[name].settings.preset.name
    assert {preset, f"{preset}_text"} & {
        case.model for case in AGAINST.CASES if case.router in routers
    }


KNOWN_SCORES = r"expected 'sqrtsoftplus' or 'sigmoid' in a configuration of 'deepseek_v4"
REFUSED = [
    (
        "deepseek_v4",
        "score_fn",
        torch.nn.ReLU(),
        rf"scoring_func: {KNOWN_SCORES}', got 'ReLU\(\)'; read from score_fn=ReLU\(\)",
    ),
    (
        "deepseek_v4",
        "score_fn",
        torch.nn.Softmax(-1),
        rf"scoring_func: {KNOWN_SCORES}', got 'softmax'; read from score_fn=",
    ),
    ("deepseek_v4_hash", "score_fn", torch.nn.Linear(2, 2), r"read from score_fn=Linear"),
    (
        "dbrx",
        "moe_normalize_expert_weights",
        2.0,
        r"expert_weights: expected 1 or None in .*, got 2\.0; read from moe_norm",
    ),
    (
        "cohere2_moe",
        "expert_selection_fn",
        "gelu",
        r"expert_selection_fn: expected 'softmax' or 'sigmoid' in .*, got 'gelu'",
    ),
    (
        "deepseek_v2",
        "topk_method",
        "noaux_tc",
        r"topk_method: expected 'greedy' or 'group_limited_greedy' in .*'noaux_tc'",
    ),
    (
        "deepseek_v3",
        "num_group",
        0,
        r"n_group: expected an integer >= 1, got 0; read from num_group=0",
    ),
    (
        "deepseek_v3",
        "num_group",
        torch.ones(2),
        r"num_group: expected a plain value, got a Tensor of shape \[2\]",
    ),
    (
        "deepseek_v3",
        "routed_scaling_factor",
        10**400,
        r"routed_scaling_factor: expected a finite number, got 1000",
    ),
    (
        "lfm2_moe",
        "use_expert_bias",
        torch.ones(1),
        r"use_expert_bias: expected a plain value, got a Tensor of shape \[1\]",
    ),
    (
        "ernie4_5_moe",
        "norm_min",
        -1.0,
        r"renorm_floor: expected a number from .*, got -1\.0; read from norm_min=-1\.0",
    ),
]


@pytest.mark.parametrize(("model", "attribute", "value", "reason"), REFUSED)
def test_a_setting_that_the_preset_cannot_have_leaves_the_router_and_is_named(
    model, attribute, value, reason
):
    case = AGAINST.BY_MODEL[model]
    router, _, _ = made(case, case.settings[0])
    router._modules.pop(attribute, None)
    setattr(router, attribute, value)
    with pytest.warns(MoeRoutingWarning, match=f"its settings cannot be routed: .*{reason}"):
        assert [layer.replaced for layer in patch(router).layers] == [False]


@pytest.mark.parametrize(
    ("attribute", "value", "said"),
    [
        ("routed_scaling_factor", np.float32(0.5), {"scale": 0.5}),
        ("topk_group", np.int64(1), {"topk_groups": 1}),
        ("norm_topk_prob", np.False_, {"renormalize": False}),
        ("norm_topk_prob", 0, {"renormalize": False}),
        ("norm_topk_prob", None, {"renormalize": False}),
    ],
)
def test_a_setting_of_another_type_is_followed_as_the_routers_own_code_does(attribute, value, said):
    case = AGAINST.BY_MODEL["deepseek_v3"]
    router, _, _ = made(case, case.settings[0])
    expected = install(made(case, case.settings[0])[0])[0].replace(**said)
    setattr(router, attribute, value)
    assert install(router)[0] == expected


@pytest.mark.parametrize(("case", "said"), LEFT)
def test_router_that_selects_otherwise_than_its_preset_is_left_with_the_reason(case, said):
    router, _, _ = made(case, said)
    with pytest.warns(MoeRoutingWarning, match="experts outside the kept groups"):
        report = patch(router)
    assert [layer.router for layer in report.left] == ["axk2.AXK2TopkRouter"]
    assert type(router).__module__.startswith("transformers.")


def test_training_of_phimoe_keeps_its_own_code():
    case = AGAINST.BY_MODEL["phimoe"]
    router, _, call = made(case, case.settings[0])
    router.train()
    torch.manual_seed(1)
    theirs = call()
    report = patch(router)
    torch.manual_seed(1)
    assert_same(call(), theirs)
    assert report.layers[0].reason == "training keeps its own code"


def test_every_preset_has_a_router_that_is_known():
    classes = {case.router for case in AGAINST.CASES}
    assert classes == set(known())
    covered = {MODELS[case.model].spec.family for case in AGAINST.CASES}
    assert {MODELS[name].spec.family for name in set(MODELS) - AGAINST.FROM_ELSEWHERE} <= covered


SHAPES = {"hidden_dim", "hidden_size", "num_experts", "n_routed_experts", "router_dim", "training"}
READ_AT_EACH_CALL = {
    "top_k",
    "router_logit_softcapping",
    "output_multiplier",
    "scalar_root_size",
    "use_eda",
}
READ_AT_EACH_CALL |= {"num_router_classes", "router_states_scale"}
"""Settings that the recipes read for themselves: K, and what the logits are computed with."""
TRAINING_ONLY = {"input_jitter_noise"}
"""Settings of Phi-3.5-MoE's own code, which trains."""


def plain_attributes_read(router):
    """Name the numbers, switches and words that a router's own code reads."""
    methods = [
        value for value in vars(type(router)).values() if isinstance(value, types.FunctionType)
    ]
    trees = [
        ast.parse(textwrap.dedent(inspect.getsource(m.__code__)))
        for m in methods
        if m.__name__ != "__init__"
    ]
    names = {
        node.attr
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }
    return {
        name
        for name in names
        if isinstance(getattr(router, name, None), (int, float, str, bool, type(None)))
    }


@pytest.mark.parametrize(
    ("case", "said"), [parameters for parameters in REPLACED if parameters.id.endswith("-0")]
)
def test_every_setting_that_a_routers_own_code_reads_is_read_at_each_call(case, said):
    router, _, _ = made(case, said)
    _, recipe = install(made(case, said)[0])
    assert plain_attributes_read(router) - SHAPES - READ_AT_EACH_CALL - TRAINING_ONLY <= set(
        recipe.settings.names
    )


OTHER = {
    "norm_topk_prob": lambda value: not value,
    "use_expert_bias": lambda value: not value,
    "routed_scaling_factor": lambda value: value * 2 + 1,
    "route_scale": lambda value: value * 2 + 1,
    "router_scaling_factor": lambda value: value * 2 + 1,
    "norm_min": lambda _: 0.5,
    "norm_topk_prob_eps": lambda _: 0.5,
    "topk_group": lambda value: max(1, (value or 1) - 1),
    "num_group": lambda value: value,
    "topk_method": lambda value: value,
    "score_fn": lambda value: torch.nn.Sigmoid() if type(value).__name__ != "Sigmoid" else value,
    "expert_selection_fn": lambda value: "sigmoid" if value == "softmax" else "softmax",
    "moe_normalize_expert_weights": lambda value: None if value else 1.0,
    "router_jitter_noise": lambda value: value * 2,
    "top_k": lambda value: value + 1,
}


@pytest.mark.slow
@pytest.mark.parametrize(("case", "said"), REPLACED)
@torch.no_grad()
def test_every_setting_that_changes_after_patch_is_followed(case, said):
    for name in install(made(case, said)[0])[1].settings.names:
        router, _, call = made(case, said)
        patch(router)
        call()
        setattr(router, name, OTHER[name](getattr(router, name)))
        ours = call()
        unpatch(router)
        assert_same(in_order_of_ids(ours), in_order_of_ids(call()))
