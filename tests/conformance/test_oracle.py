"""The oracle against an independent brute force.

It enumerates all selections, and computes with 50 digits.
"""

import itertools
import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf

from moe_routing.conformance.variants import VARIANTS
from moe_routing.reference import oracle
from moe_routing_registry import RoutingSpec

mp.dps = 50
LARGEST = float(torch.finfo(torch.float32).max)
E, K, VOCABULARY = 6, 2, 3

LOGITS = st.sampled_from(
    [-200.0, -3.0, -1.0, -0.5, -0.0, 0.0, 0.25, 1.0, 2.0, 5.0, 30.0, math.nan, math.inf, -math.inf]
)
BIASES = st.sampled_from([-1.0, 0.0, 0.125, 0.5, 12.0, -1e4])


def small(spec):
    """Return the spec with groups that six experts can have."""
    if spec.zero_experts:
        spec = spec.replace(zero_experts=2)
    if spec.num_groups > 1:
        spec = spec.replace(num_groups=2, topk_groups=1)
    return spec


def clean(l):
    if math.isnan(l):
        return -LARGEST
    return min(max(l, -LARGEST), LARGEST)


def activated(spec, l):
    x = mpf(min(max(l * spec.logit_multiplier, -LARGEST), LARGEST))
    return (
        x
        if spec.logit_softcap is None
        else spec.logit_softcap * mpmath.tanh(x / spec.logit_softcap)
    )


def scores(spec, x):
    if spec.score == "softmax":
        terms = [mpmath.exp(v) for v in x]
        return [t / mpmath.fsum(terms) for t in terms]
    if spec.score == "sigmoid":
        return [1 / (1 + mpmath.exp(-v)) for v in x]
    # Below -150, log(1 + e^x) is e^x in 50 digits.
    return [mpmath.sqrt(mpmath.exp(v) if v < -150 else mpmath.log1p(mpmath.exp(v))) for v in x]


def best_ordered(keys, among, count):
    """Return the ordered selection that has the highest keys.

    Among equal keys, lower ids come first.
    """
    return max(itertools.permutations(among, count), key=lambda ids: [(keys[i], -i) for i in ids])


def group_score(spec, judged, group):
    # Each sum is rounded once, like the keys: one with -3.4e38 in it swallows the other score, in
    # float64 as in float32.
    best, *others = sorted((judged[e] for e in group), reverse=True)[: spec.group_sum]
    for value in others:
        best = mpf(clean(float(best + value)))
    return best


def selected(spec, keys, judged, topk):
    size = E // spec.num_groups
    groups = [range(g * size, (g + 1) * size) for g in range(spec.num_groups)]
    if spec.topk_per_group:
        among = [i for group in groups for i in best_ordered(keys, group, topk // spec.num_groups)]
    elif spec.num_groups > 1:
        values = [group_score(spec, judged, group) for group in groups]
        among = [
            i
            for g in best_ordered(values, range(spec.num_groups), spec.topk_groups)
            for i in groups[g]
        ]
    else:
        among = range(E)
    return best_ordered(keys, among, topk)


def sparsemixer(spec, l, topk):
    ids, weights = [], []
    for _ in range(topk):
        left = [e for e in range(E) if e not in ids]
        top = best_ordered(l, left, 1)[0]
        near = [
            e
            for e in left
            if l[top] == l[e] or (l[top] - l[e]) / max(abs(l[e]), l[top]) <= 2 * spec.jitter
        ]
        weights.append(1 / mpmath.fsum(mpmath.exp(l[e] - l[top]) for e in near))
        ids.append(top)
    return ids, weights


def brute_force(spec, row, topk, *, bias, scale, table_row):  # noqa: PLR0913 -- the operands of the maths
    l = [mpf(clean(v)) for v in row]
    x = [activated(spec, v) for v in l]
    s = scores(spec, x)
    if spec.selection == "sparsemixer":
        ids, w = sparsemixer(spec, l, topk)
    else:
        keys = {"scores_plus_bias": s, "logits_plus_bias": x}.get(spec.selection, l)
        if spec.needs_bias:
            # Rounded once, to the oracle's precision: what float64 cannot tell apart is a tie
            # there.
            keys = [
                mpf(float(min(max(k + b, -LARGEST), LARGEST)))
                for k, b in zip(keys, bias, strict=True)
            ]
        ids = table_row
        if spec.selection != "token_table":
            ids = selected(spec, keys, keys if spec.group_by == "selection" else s, topk)
        w = [s[i] for i in ids]
        if spec.renormalize:
            w = [v / max(mpmath.fsum(w) + spec.renorm_epsilon, spec.renorm_floor) for v in w]
    w = [spec.scale * (scale[i] if scale else 1) * v for i, v in zip(ids, w, strict=True)]
    w = [mpf(0) if i >= E - spec.zero_experts else v for i, v in zip(ids, w, strict=True)]
    shared = range(E, E + spec.shared_experts)
    return [*ids, *shared], [*w, *(mpf(spec.shared_weight) for _ in shared)]


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_the_oracle_is_what_enumeration_finds(variant, data):
    spec = small(VARIANTS[variant])
    row = data.draw(st.lists(LOGITS, min_size=E, max_size=E))
    bias = data.draw(st.lists(BIASES, min_size=E, max_size=E)) if spec.needs_bias else None
    scale = [0.5 + e for e in range(E)] if spec.per_expert_scale else None
    table = data.draw(st.permutations(range(E)))[:K] if spec.selection == "token_table" else None

    def tensor(values, dtype=torch.float32):
        return None if values is None else torch.tensor(values, dtype=dtype)

    got = oracle.route(
        spec,
        tensor([row]),
        K,
        bias=tensor(bias),
        per_expert_scale=tensor(scale),
        token_ids=None if table is None else torch.tensor([1]),
        expert_table=None if table is None else torch.tensor([[0] * K, table]),
    )

    ids, weights = brute_force(spec, row, K, bias=bias, scale=scale, table_row=table)
    assert got.ids.tolist() == [list(ids)]
    for ours, exact in zip(got.weights[0].tolist(), weights, strict=True):
        assert ours == pytest.approx(float(exact), rel=1e-11, abs=1e-300)


def test_padding_is_blanked_last_and_ids_are_renamed_before():
    spec = VARIANTS["gemma4/shared"].replace(shared_weight=0.5)
    weights, ids = oracle.route(
        spec,
        torch.tensor([[1.0, 2.0], [1.0, 2.0]]),
        1,
        per_expert_scale=torch.tensor([3.0, 5.0]),
        num_valid_tokens=torch.tensor([1]),
        expert_map=torch.tensor([10, 11, 12, 13]),
    )
    assert ids.tolist() == [[11, 12, 13], [-1, -1, -1]]
    assert weights.tolist() == [[5.0, 0.5, 0.5], [0.0, 0.0, 0.0]]


def test_an_unknown_score_function_is_named():
    spec = VARIANTS["softmax_topk"].replace(score="entmax")
    with pytest.raises(ValueError, match="entmax"):
        oracle.route(spec, torch.zeros(1, 4), 2)


def test_more_valid_tokens_than_an_integer_of_torch_can_say_are_all():
    logits = torch.randn(3, 4)
    for valid in (3, 2**63 - 1, 2**63, 2**70):
        assert (
            oracle.route(RoutingSpec(family="f"), logits, 2, num_valid_tokens=valid).ids >= 0
        ).all()
