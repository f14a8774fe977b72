"""The comparison with the oracle tells what float32 can tell, and no more."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moe_routing import RoutingOutput, RoutingSpec
from moe_routing.conformance.cases import Case
from moe_routing.conformance.variants import VARIANTS
from moe_routing.reference import error_bounds, oracle
from moe_routing.reference.compare import compare

BIASED = [
    name
    for name, spec in VARIANTS.items()
    if spec.selection == "scores_plus_bias" and spec.num_groups == 1
]
PLAIN = RoutingSpec(family="f", renormalize=True)


def exact(spec, logits, topk, **operands):
    weights, ids = oracle.route(spec, logits, topk, **operands)
    return RoutingOutput(weights.float(), ids.int())


def at(spec, logits, ids, **operands):
    """Return the output that a backend with these ids would give."""
    return RoutingOutput(oracle.weights_at(spec, logits, ids, **operands).float(), ids.int())


@pytest.mark.slow
@pytest.mark.parametrize("variant", BIASED)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), place=st.integers(0, 3), factor=st.floats(0.05, 20))
def test_a_swap_is_right_exactly_when_the_gap_is_under_the_bound(variant, seed, place, factor):
    spec = VARIANTS[variant].replace(shared_experts=0, zero_experts=0)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 8, generator=generator) * 3
    bias = torch.randn(8, generator=generator)
    keys = oracle.selection_keys(spec, logits, bias=bias)[0]
    order = oracle.descending(keys[None])[0]
    upper, lower = order[place], order[place + 1]
    error = error_bounds.key_error(spec, logits, keys[None])[0]
    # Lift the lower expert to `factor` bounds below the upper one, as far as a float32 bias can.
    bias[lower] += (keys[upper] - keys[lower] - factor * (error[upper] + error[lower])).float()
    keys = oracle.selection_keys(spec, logits, bias=bias)[0]
    error = error_bounds.key_error(spec, logits, keys[None])[0]
    gap, blur = float(keys[upper] - keys[lower]), float(error[upper] + error[lower])
    assume(gap > 0)
    assume(not 0.999 < gap / blur < 1.001)
    order = oracle.descending(keys[None])[0]
    assume(order[place] == upper)
    assume(order[place + 1] == lower)

    swapped = order.clone()
    swapped[place], swapped[place + 1] = lower, upper
    # At the last place the swap exchanges the last of the chosen for one that was not chosen.
    found = compare(spec, logits, 4, at(spec, logits, swapped[None, :4]), bias=bias)

    assert found.ok == (gap < blur)
    assert found.near_ties == int(gap < blur)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.floats(0.01, 60), shift=st.floats(-60, 20))
def test_float32_arithmetic_stays_within_the_bound(score, seed, scale, shift):
    spec = RoutingSpec(family="f", score=score, selection="scores_plus_bias")
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 300, generator=generator) * scale + shift
    bias = torch.randn(300, generator=generator)
    e, terms = x.abs().neg().exp(), (x - x.amax(-1, keepdim=True)).exp()
    in_float32 = {
        "softmax": terms / terms.cumsum(-1)[:, -1:],
        "sigmoid": torch.where(x < 0, e, 1.0) / (1 + e),
        "sqrtsoftplus": (x.clamp(min=0) + e.log1p()).sqrt(),
    }[score]
    keys = oracle.selection_keys(spec, x, bias=bias)

    error = error_bounds.key_error(spec, x, keys)

    assert ((in_float32 + bias).double() - keys).abs().le(error).all()
    # And the bound is no licence: it stays near the unit roundoff.
    assert error.max() < 1e-5 * (1 + keys.abs().max())


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_bfloat16_scores_are_far_outside_the_bound(score):
    spec = RoutingSpec(family="f", score=score, selection="scores_plus_bias")
    x = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    keys = oracle.selection_keys(spec, x, bias=torch.zeros(300))
    off = (keys.bfloat16().double() - keys).abs()
    assert (off > error_bounds.key_error(spec, x, keys)).double().mean() > 0.9


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**31), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_selection_on_logits_has_no_tolerance(seed, dtype):
    logits = torch.randn(1, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)
    ids = oracle.select(PLAIN, logits, 3)
    logits[0, ids[0, 1]] = logits[0, ids[0, 2]]
    logits[0, ids[0, 1]] = torch.nextafter(logits[0, ids[0, 1]].float(), torch.tensor(99.0)).to(
        dtype
    )
    ids = oracle.select(PLAIN, logits, 3)
    swapped = ids[:, [0, 2, 1]]

    assert compare(PLAIN, logits, 3, at(PLAIN, logits, ids)).ok
    assert not compare(PLAIN, logits, 3, at(PLAIN, logits, swapped)).ok


@pytest.mark.parametrize("variant", BIASED)
def test_experts_with_the_same_logit_and_bias_have_an_order(variant):
    spec = VARIANTS[variant].replace(shared_experts=0, zero_experts=0)
    logits, bias = torch.zeros(1, 4), torch.full((4,), 0.5)
    found = compare(spec, logits, 2, at(spec, logits, torch.tensor([[1, 0]])), bias=bias)
    assert found.problems == [
        "row 0: id 1 at position 0 stands before id 0 although their scores are equal"
    ]
    assert not compare(spec, logits, 2, at(spec, logits, torch.tensor([[0, 2]])), bias=bias).ok


def grouped(**changes):
    return VARIANTS["grouped_sigmoid_bias"].replace(num_groups=4, topk_groups=2, **changes)


def test_a_group_may_be_exchanged_for_one_that_float32_cannot_tell_from_it():
    logits, spec = torch.tensor([[3.0, 3.0, 2.0, 2.0, 2.0, 2.0, -1.0, -1.0]]), grouped()
    bias = torch.zeros(8)
    bias[2:4] = 3e-8
    first, second = torch.tensor([[0, 1, 2]]), torch.tensor([[0, 1, 4]])
    assert oracle.select(spec, logits, 3, bias=bias).tolist() == first.tolist()
    assert compare(spec, logits, 3, at(spec, logits, second), bias=bias).ok
    bias[2:4] = 3e-6
    assert not compare(spec, logits, 3, at(spec, logits, second), bias=bias).ok


def test_groups_with_the_same_experts_have_an_order():
    logits, bias, spec = torch.zeros(1, 8), torch.zeros(8), grouped()
    assert compare(spec, logits, 2, at(spec, logits, torch.tensor([[0, 1]])), bias=bias).ok
    assert not compare(spec, logits, 2, at(spec, logits, torch.tensor([[2, 3]])), bias=bias).ok


def test_ids_from_more_groups_than_are_kept_are_wrong():
    logits, bias, spec = torch.tensor([[3.0, 0, 3, 0, 3, 0, 0, 0]]), torch.zeros(8), grouped()
    found = compare(spec, logits, 3, at(spec, logits, torch.tensor([[0, 2, 4]])), bias=bias)
    assert "not among the best 2" in found.problems[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_oracle_rounded_to_float32_is_right(variant):
    case = Case(variant=variant, topk=2 if "sparse" in variant else 8, mapped=True, valid="tensor")
    call = case.make()
    output = call.exact()
    found = compare(
        call.spec,
        call.logits,
        call.topk,
        RoutingOutput(output.weights.float(), output.ids),
        **call.operands,
    )
    assert found.problems == []
    assert found.near_ties == 0


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda w, i: (w * (1 + 4e-6), i), "weight of id"),
        (lambda w, i: (w.double(), i), "expected dtype torch.float32"),
        (lambda w, i: (w, i.short()), "expected dtype torch.int32 or torch.int64"),
        (lambda w, i: (w[:, :2], i[:, :2]), "expected shape"),
        (lambda w, i: (w, i.scatter(1, torch.tensor([[0]]), 8)), "not all in [0, 8)"),
        (lambda w, i: (w, i[:, [0, 0, 2]]), "not unique"),
        (lambda w, i: (w.fill_(torch.nan), i), "weight of id"),
    ],
)
def test_each_kind_of_wrong_output_is_told(change, problem):
    logits = torch.randn(1, 8, generator=torch.Generator().manual_seed(0))
    wrong = RoutingOutput(*change(*exact(PLAIN, logits, 3)))
    assert problem in compare(PLAIN, logits, 3, wrong).problems[0]


def test_padding_and_shared_slots_are_compared():
    spec = PLAIN.replace(shared_experts=1)
    logits = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    weights, ids = exact(spec, logits, 3)
    assert (
        "ids -1"
        in compare(spec, logits, 3, RoutingOutput(weights, ids), num_valid_tokens=1).problems[0]
    )
    assert (
        "expected ids [8]"
        in compare(spec, logits, 3, RoutingOutput(weights, ids.clamp(max=7))).problems[0]
    )
    assert (
        "expected weight 1"
        in compare(spec, logits, 3, RoutingOutput(weights * 1.5, ids)).problems[0]
    )


def test_sparsemixers_mask_may_go_either_way_at_its_threshold():
    spec = VARIANTS["sparsemixer"]
    spec = spec.replace(jitter=0.1)
    # (5 - 4) / 5 is 0.2, and whether a float32 0.2 is above the threshold is a matter of how that
    # is rounded.
    logits, ids = torch.tensor([[5.0, 4.0, 1.0]]), torch.tensor([[0]])
    alone, two = (at(spec.replace(jitter=jitter), logits, ids) for jitter in (0.0999, 0.1001))
    assert alone.weights.item() == 1.0
    assert two.weights.item() < 0.8
    assert compare(spec, logits, 1, alone).ok
    assert compare(spec, logits, 1, two).ok
    assert not compare(spec, logits, 1, at(spec.replace(jitter=10.0), logits, ids)).ok


def test_a_soft_cap_widens_the_tolerance_of_weights_by_what_it_rounds():
    capped = RoutingSpec(family="f", logit_softcap=30.0)
    logits = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) * 20
    x = (logits / 30).tanh() * 30
    weights = x.softmax(-1)
    ids = oracle.select(capped, logits, 8)
    assert compare(capped, logits, 8, RoutingOutput(weights.gather(1, ids), ids)).ok
    off = RoutingOutput(weights.gather(1, ids) * (1 + 1e-4), ids)
    assert not compare(capped, logits, 8, off).ok
