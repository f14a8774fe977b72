"""The built-in families.

They are complete, named as documented, and related to each other as their formulas say.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from moe_routing.families import FAMILIES
from moe_routing.models import MODELS
from moe_routing.reference import oracle
from moe_routing_registry import RoutingSpec

FORMULAS = {
    "softmax_topk": "ids = topk(l); w = softmax(l)[ids]",
    "topk_softmax": "ids = topk(l); w = softmax(l[ids])",
    "gemma4": "ids = topk(l); w = softmax(l[ids]) * per_expert_scale[ids]",
    "softmax_bias_topk": "ids = topk(softmax(l)+b); w = softmax(l)[ids]",
    "sigmoid_topk": "ids = topk(l); w = sigmoid(l)[ids]",
    "sigmoid_bias_topk": "ids = topk(sigmoid(l)+b); w = sigmoid(l)[ids] / sum",
    "grouped_sigmoid_bias": "ids = topk(sigmoid(l)+b) in the best 4 of 8 groups by sum of best 2; "
    "w = sigmoid(l)[ids] / (sum + 1e-20)",
    "grouped_softmax": "ids = topk(l) in the best 3 of 8 groups by max; w = softmax(l)[ids]",
    "sqrtsoftplus_bias": "ids = topk(sqrtsoftplus(l)+b); w = sqrtsoftplus(l)[ids] / sum",
    "hash_sqrtsoftplus": "ids = table[token_id]; w = sqrtsoftplus(l)[ids] / sum",
    "topk_sigmoid": "ids = topk(l); w = sigmoid(l)[ids]",
    "sparsemixer": "ids = K rounds of argmax(l), each without entries (m-l)/max(|l|,m) > 0.02; "
    "w = softmax(masked l)[id] of each round",
    "partitioned_softmax": "ids = top K/8 of l in each of 8 groups; w = softmax(l[ids])",
    "logit_bias_sigmoid": "ids = topk(l+b); w = sigmoid(l)[ids]",
}


@pytest.fixture
def logits():
    return torch.randn(64, 32, generator=torch.Generator().manual_seed(0))


def route(spec, logits, topk=8, **operands):
    return oracle.route(spec, logits, topk, **operands)


def assert_same(first, second):
    assert torch.equal(first.ids, second.ids)
    torch.testing.assert_close(first.weights, second.weights)


def test_families_are_the_documented_ones_with_the_documented_formulas():
    assert {name: spec.spec.formula for name, spec in FAMILIES.items()} == FORMULAS


@pytest.mark.parametrize("name", FAMILIES)
def test_family_goes_by_the_name_in_its_spec_and_says_where_it_comes_from(name):
    spec = FAMILIES[name]
    assert spec.spec.family == name
    assert spec.source
    assert RoutingSpec.from_json(spec.spec.to_json()) == spec.spec


def test_families_cannot_be_changed_by_accident():
    with pytest.raises(TypeError):
        FAMILIES["mine"] = FAMILIES["gemma4"]


def test_every_family_serves_a_model():
    by_default = {preset.family for preset in MODELS.values()}
    by_choice = {
        changes["family"]
        for preset in MODELS.values()
        for options in preset.choices.values()
        for changes in options.values()
        if "family" in changes
    }
    assert by_default | by_choice == set(FAMILIES)


def test_importing_families_and_models_imports_neither_torch_nor_transformers():
    code = (
        "import sys, moe_routing.families, moe_routing.models; "
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_topk_softmax_is_softmax_topk_renormalised(logits):
    renormalised = FAMILIES["softmax_topk"].spec.replace(renormalize=True)
    assert_same(route(FAMILIES["topk_softmax"].spec, logits), route(renormalised, logits))


def test_gemma4_with_scales_of_one_is_topk_softmax(logits):
    gemma4 = route(FAMILIES["gemma4"].spec, logits, per_expert_scale=torch.ones(32))
    assert_same(gemma4, route(FAMILIES["topk_softmax"].spec, logits))


@pytest.mark.parametrize(
    ("biased", "plain"),
    [
        ("sigmoid_bias_topk", "sigmoid_topk"),
        ("softmax_bias_topk", "softmax_topk"),
        ("logit_bias_sigmoid", "topk_sigmoid"),
    ],
)
def test_a_bias_of_zero_selects_as_no_bias_does(logits, biased, plain):
    with_bias = FAMILIES[biased].spec
    without = FAMILIES[plain].spec.replace(renormalize=with_bias.renormalize)
    assert_same(route(with_bias, logits, bias=torch.zeros(32)), route(without, logits))


@pytest.mark.parametrize(
    ("grouped", "plain"),
    [("grouped_sigmoid_bias", "sigmoid_bias_topk"), ("grouped_softmax", "softmax_topk")],
)
def test_groups_that_are_all_kept_limit_nothing(logits, grouped, plain):
    spec = FAMILIES[grouped].spec
    operands = {"bias": torch.linspace(-0.2, 0.2, 32)} if spec.needs_bias else {}
    all_kept = route(spec.replace(topk_groups=spec.num_groups), logits, **operands)
    assert_same(all_kept, route(FAMILIES[plain].spec, logits, **operands))
    assert not torch.equal(route(spec, logits, **operands).ids, all_kept.ids)


def test_hash_routing_with_the_selected_ids_in_its_table_weighs_as_scored_routing(logits):
    scored = route(FAMILIES["sqrtsoftplus_bias"].spec, logits, bias=torch.zeros(32))
    hashed = route(
        FAMILIES["hash_sqrtsoftplus"].spec,
        logits,
        token_ids=torch.arange(64),
        expert_table=scored.ids,
    )
    assert_same(hashed, scored)


def test_partitioned_softmax_takes_as_many_experts_from_each_group(logits):
    ids = route(FAMILIES["partitioned_softmax"].spec, logits, 16).ids
    assert torch.equal(
        (ids // 4).sort().values, torch.arange(8).repeat_interleave(2).expand(64, 16)
    )


@pytest.mark.parametrize(
    ("selection", "field", "value"),
    [
        ("sparsemixer", "score", "sigmoid"),
        ("sparsemixer", "renormalize", True),
        ("sparsemixer", "num_groups", 2),
        ("sparsemixer", "topk_per_group", True),
        ("sparsemixer", "logit_softcap", 30.0),
        ("sparsemixer", "logit_multiplier", 0.5),
        ("token_table", "num_groups", 2),
        ("token_table", "topk_per_group", True),
    ],
)
def test_a_field_that_a_selection_has_no_use_for_is_refused(selection, field, value):
    with pytest.raises(
        ValueError,
        match=f"^{field}: expected .*, because selection '{selection}' has no use for it, got ",
    ):
        RoutingSpec(family="f", selection=selection, **{field: value})
    RoutingSpec(family="f", **{field: value})
