"""What only the eager backend has.

Its three ways to select must agree, and its bits must not depend on T. So must its ways to sort for
a plan.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_routing
from moe_routing import Router, RoutingSpec
from moe_routing.families import FAMILIES
from moe_routing.formula import by_rounds, by_rounds_in_place, by_sort, by_topk
from moe_routing.planning import PlanProblem
from moe_routing.reference import plan_oracle
from moe_routing_backends.eager import plan as eager_plan
from moe_routing_backends.eager.plan import MOST_IN_BYTES, RADIX_FROM
from moe_routing_backends.eager.route import CHUNK

NEXT = 1 + 2.0**-23
MOST = torch.finfo(torch.float32).max
TIES = st.sampled_from(
    [0.0, -0.0, 1.0, NEXT, -1.0, -NEXT, 2.0**-149, -(2.0**-149), MOST, -MOST, 0.1, 2.0, -torch.inf]
)
"""Ties, neighbours, both ends of float32, and what masks experts of a group that is not kept."""


def brute_force(row, k):
    """Sort by (descending score, ascending id) in Python."""
    return sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]


@given(
    rows=st.integers(1, 24).flatmap(
        lambda e: st.lists(st.lists(TIES, min_size=e, max_size=e), min_size=1, max_size=4)
    ),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
def test_every_way_to_select_is_the_brute_force_one(rows, data):
    t = torch.tensor(rows, dtype=torch.float32)
    k = data.draw(st.integers(1, t.shape[1]))
    expected = [brute_force(row, k) for row in t.tolist()]
    for way in (by_sort, by_rounds, by_rounds_in_place, by_topk):
        assert way(t, k).tolist() == expected, way.__name__


@pytest.mark.parametrize("scale", [1.0, 2.0**-126, 2.0**-149, 2.0**127])
@pytest.mark.parametrize("experts", [2048, 8192])
def test_keys_of_many_experts_stay_between_neighbouring_scores(experts, scale):
    generator = torch.Generator().manual_seed(experts)
    t = (1 + torch.randint(0, 40, (4, experts), generator=generator) * 2.0**-23) * scale
    t[:, ::3] *= -1
    assert torch.equal(by_topk(t, 64), by_sort(t, 64))
    assert torch.equal(by_topk(t, experts), by_sort(t, experts))


@pytest.mark.parametrize("experts", [60, 128])
@pytest.mark.parametrize("name", FAMILIES)
def test_bits_of_a_row_do_not_depend_on_the_batch(name, experts):
    spec = FAMILIES[name].spec
    if spec.num_groups > 1:
        spec = spec.replace(num_groups=4, topk_groups=2)
    topk = {"sparsemixer": 2, "partitioned_softmax": 2 * spec.num_groups}.get(name, 6)
    torch.manual_seed(1)
    tokens = 3 * CHUNK // experts // 2
    logits = torch.randn(tokens, experts) * 4
    operands = {}
    if spec.per_expert_scale:
        operands["per_expert_scale"] = torch.rand(experts)
    if spec.needs_bias:
        operands["bias"] = torch.randn(experts)
    table = None
    if spec.selection == "token_table":
        table = torch.rand(50, experts).argsort(-1)[:, :topk]
        token_ids = torch.randint(50, (tokens,))
    route = Router(spec)

    def run(rows):
        by_table = {} if table is None else {"token_ids": token_ids[rows], "expert_table": table}
        return route(logits[rows], topk, **operands, **by_table)

    whole = run(slice(None))
    for start, stop in [(0, 1), (1, 4), (5, 38), (100, 163), (7, tokens - 1)]:
        part = run(slice(start, stop))
        assert torch.equal(part.ids, whole.ids[start:stop])
        assert torch.equal(part.weights, whole.weights[start:stop])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.float8_e5m2])
def test_other_float_dtypes_are_taken_as_their_float32_values(dtype):
    logits = torch.randn(5, 16).to(dtype)
    route = Router(RoutingSpec(family="f", renormalize=True))
    ours, theirs = route(logits, 4), route(logits.to(torch.float32), 4)
    assert torch.equal(ours.ids, theirs.ids)
    assert torch.equal(ours.weights, theirs.weights)


EDGES = {f"radix{difference:+d}": RADIX_FROM + difference for difference in (-1, 0, 1)}


@pytest.mark.parametrize("strays", ["none", "one", "many"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("experts", [1, MOST_IN_BYTES, MOST_IN_BYTES + 1, 4096])
@pytest.mark.parametrize("tokens", [5, 2000, *EDGES.values()], ids=["few", "more", *EDGES])
@pytest.mark.parametrize("numpy", [True, False], ids=["numpy", "torch"])
def test_every_way_to_sort_makes_the_plan_of_the_definition(  # noqa: PLR0913, PLR0917 -- as many ways
    monkeypatch, numpy, tokens, experts, dtype, strays
):
    if not numpy:
        monkeypatch.setattr(eager_plan, "_numpy", lambda: None)
    whole = torch.iinfo(dtype)
    ids = torch.randint(0, experts, (tokens, 1), dtype=dtype)
    if strays == "one":
        ids[tokens // 2] = -1
    elif strays == "many":
        ids[::4] = torch.randint(whole.min, whole.max, ids[::4].shape, dtype=dtype)
        ids[0] = whole.max
        ids[1] = whole.min
        ids[2] = 1 << 20  # its lower bytes are those of an expert
        ids[3] = experts
    problem = PlanProblem(num_experts=experts, topk=1, ids_dtype=str(dtype).removeprefix("torch."))
    made = moe_routing.plan(ids, experts)
    eager_plan.build(problem, moe_routing.probe("cpu"))(ids, made)
    for part, expected in zip(made, plan_oracle.plan(problem, ids), strict=True):
        assert (part is expected is None) or torch.equal(part, expected)
