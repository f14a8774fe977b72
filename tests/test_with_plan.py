"""``Router.with_plan``: one call that routes and plans.

It is a call of the router and then a plan of its ids, with one difference: all is checked before
anything is written. What a plan must be is in the contract, which ``tests/conformance`` holds.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import moe_routing
from moe_routing import Router, RoutingSpec
from moe_routing._registry import registry
from moe_routing.planning import DispatchPlan, PlanProblem, RoutedPlan, routed
from moe_routing.reference import plan_oracle
from moe_routing_registry import BackendSpec, Target

T, E, K = 5, 8, 2
SOFTMAX = RoutingSpec(family="topk_softmax", renormalize=True)
SCALED = RoutingSpec(family="f", renormalize=True, per_expert_scale=True)
BIASED = RoutingSpec(
    family="f", score="sigmoid", selection="scores_plus_bias", renormalize=True,
    per_expert_scale=True,
)  # fmt: skip
GROUPED = RoutingSpec(
    family="f", score="sigmoid", selection="scores_plus_bias", num_groups=4, topk_groups=2,
    group_sum=2,
)  # fmt: skip
SHARED = RoutingSpec(family="f", renormalize=True, shared_experts=2)
TABLE = RoutingSpec(family="f", selection="token_table")
SPECS = {
    "softmax": SOFTMAX,
    "scale": SCALED,
    "bias": BIASED,
    "groups": GROUPED,
    "shared": SHARED,
    "table": TABLE,
}
PLANS = {
    "sorted": {},
    "blocks": {"block": 4},
    "masked": {"capacity": 3, "masked": True},
    "capacity": {"capacity": 2},
    "blocks, least weight": {"block": 3, "capacity": 2, "drop": "least_weight"},
}


def operands_of(spec, tokens=T):
    """Return what the spec takes, with random values."""
    made = {"logits": torch.randn(tokens, E)}
    if spec.per_expert_scale:
        made["per_expert_scale"] = torch.rand(E)
    if spec.needs_bias:
        made["bias"] = torch.randn(E)
    if spec.selection == "token_table":
        rows = [torch.randperm(E)[:K] for _ in range(20)]
        made |= {"token_ids": torch.randint(20, (tokens,)), "expert_table": torch.stack(rows)}
    return made


def oracle(routed_plan, experts, **asked):
    """Return the one right plan of the ids that came out."""
    weights, ids, _ = routed_plan
    block, capacity = asked.get("block"), asked.get("capacity")
    problem = PlanProblem(
        num_experts=experts,
        topk=ids.shape[1],
        ids_dtype=str(ids.dtype).removeprefix("torch."),
        layout="masked" if asked.get("masked") else "sorted" if block is None else "blocks",
        block=block or 1,
        drop="nothing" if capacity is None else asked.get("drop", "last"),
    )
    return plan_oracle.plan(problem, ids, capacity, weights.detach())


def tensors_of(routed_plan):
    weights, ids, plan = routed_plan
    return [weights, ids, *(part for part in plan if part is not None)]


def same(made, expected):
    for name, one, other in zip(DispatchPlan._fields, made, expected, strict=True):
        assert (one is None) == (other is None), name
        assert one is None or torch.equal(one, other), name


def emptied(routed_plan):
    """Return tensors of the same shapes that hold something else."""
    weights, ids, plan = routed_plan
    parts = [None if part is None else torch.full_like(part, -7) for part in plan]
    return RoutedPlan(torch.full_like(weights, -7), torch.full_like(ids, -7), DispatchPlan(*parts))


# What comes out


@pytest.mark.parametrize("name", SPECS)
@settings(max_examples=25)
@given(
    tokens=st.integers(0, 9),
    plan=st.sampled_from(list(PLANS)),
    ids_dtype=st.sampled_from([None, torch.int32, torch.int64]),
    valid=st.none() | st.integers(0, 12) | st.just(2**70) | st.integers(0, 12).map(torch.tensor),
    mapped=st.booleans(),
    with_out=st.booleans(),
)
def test_every_call_gives_what_the_router_gives_and_the_plan_of_its_ids(  # noqa: PLR0913, PLR0917 -- what is drawn
    name, tokens, plan, ids_dtype, valid, mapped, with_out
):
    """Each call is made three times: the first is checked, later ones are recognised."""
    spec, asked = SPECS[name], PLANS[plan]
    route, extra = Router(spec), {"num_valid_tokens": valid, "ids_dtype": ids_dtype}
    experts = E + spec.shared_experts
    if mapped:  # experts share places, and one is elsewhere
        extra["expert_map"] = torch.arange(experts) // 2 - 1
        experts //= 2
    out = None
    for call in range(3):
        given_ = operands_of(spec, tokens) | extra
        count = {"num_experts": experts} if mapped else {}
        made = route.with_plan(topk=K, **given_, **count, **asked, out=out)
        if out is not None:
            assert all(a is b for a, b in zip(tensors_of(made), tensors_of(out), strict=True))
        expected = Router(spec)(topk=K, **given_)
        assert torch.equal(made.weights, expected.weights)
        assert torch.equal(made.ids, expected.ids)
        same(made.plan, oracle(made, experts, **asked))
        if with_out and call != 1:
            out = emptied(made)


def test_calls_of_several_kinds_may_take_turns():
    route = Router(SHARED)
    for tokens in (3, 7, 3, 7, 3):
        for asked in (*PLANS.values(), *PLANS.values()):
            made = route.with_plan(torch.randn(tokens, E), K, **asked)
            same(made.plan, oracle(made, E + 2, **asked))
            assert torch.equal(route(torch.randn(tokens, E), K).ids[:, K:], made.ids[:, K:])


def test_eight_threads_may_share_a_router():
    route, wrong = Router(SOFTMAX), []

    def work(number):
        asked, out = list(PLANS.values())[number % len(PLANS)], None
        for _ in range(40):
            made = route.with_plan(torch.randn(4 + number % 3, E), K, **asked, out=out)
            try:
                same(made.plan, oracle(made, E, **asked))
            except AssertionError as error:
                wrong.append(error)
            out = emptied(made)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("with_out", [False, True])
def test_a_call_like_an_earlier_one_is_not_checked_again(with_out, monkeypatch):
    route, checks, right = Router(SCALED), [], routed.checked
    monkeypatch.setattr(
        routed, "checked", lambda *arguments: checks.append(arguments) or right(*arguments)
    )
    calls = [
        {"logits": torch.randn(T, E), "per_expert_scale": torch.rand(E), "topk": K, **asked}
        for asked in (*PLANS.values(), *PLANS.values(), *PLANS.values())
    ]
    memory = [emptied(Router(SCALED).with_plan(**call)) for call in calls]
    checks.clear()
    for call, out in zip(calls, memory, strict=True):
        route.with_plan(**call, out=out if with_out else None)
    assert len(checks) == len(PLANS)


# What is refused, and when


def refused(route, error, text, call, watched=()):
    """Require an error in a first call and in later ones, before anything is written."""
    before = [t.clone() for t in watched]
    with pytest.raises(error, match=text):
        route.with_plan(**call)
    assert all(map(torch.equal, watched, before))


PARTS = ["order", "inverse", "counts", "offsets", "block_experts", "num_dropped"]
VALID, MAP = torch.tensor([3]), torch.arange(E)
OTHERS = [
    *((BIASED, name) for name in ("logits", "per_expert_scale", "bias")),
    *((SOFTMAX, name) for name in ("num_valid_tokens", "expert_map", "weights", "ids")),
    *((TABLE, name) for name in ("token_ids", "expert_table")),
]


def call_of(spec, **asked):
    """Return the arguments of a call of everything, ``out`` too."""
    call = operands_of(spec) | {"topk": K, "block": 4, "capacity": 3, **asked}
    if spec is SOFTMAX:
        call |= {"num_valid_tokens": VALID.clone(), "expert_map": MAP.clone(), "num_experts": E}
    return call | {"out": emptied(Router(spec).with_plan(**call))}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(("spec", "other"), OTHERS, ids=[name for _, name in OTHERS])
def test_a_plan_in_the_memory_of_another_tensor_is_refused_before_anything_is_written(
    spec, other, part
):
    route = Router(spec)
    for _ in range(3):
        call = call_of(spec)
        route.with_plan(**call)  # so that later calls are recognised
        out = call["out"]
        tensor = getattr(out, other) if other in ("weights", "ids") else call[other]
        mine = getattr(out.plan, part)
        memory = torch.zeros(256, dtype=torch.int64)
        shared = memory.view(tensor.dtype)[: tensor.numel()].view(tensor.shape).copy_(tensor)
        last = (tensor.nbytes - 1) // mine.element_size()  # where the other tensor ends
        wrong = memory.view(torch.int32)[last : last + mine.numel()].view(mine.shape)
        plan = out.plan._replace(**{part: wrong})
        if other in ("weights", "ids"):
            call["out"] = out._replace(plan=plan, **{other: shared})
        else:
            call |= {other: shared, "out": out._replace(plan=plan)}
        both = f"({part} and {other}|{other} and {part})"
        text = rf"^out: expected tensors that share no memory .*'{both} that overlap'$"
        refused(route, ValueError, text, call, [memory, *tensors_of(call["out"])])


@pytest.mark.parametrize(("one", "other"), [("order", "inverse"), ("counts", "num_dropped")])
def test_parts_of_a_plan_in_one_memory_are_refused_before_anything_is_written(one, other):
    route = Router(SOFTMAX)
    for _ in range(3):
        call = call_of(SOFTMAX)
        route.with_plan(**call)
        out, first = call["out"], getattr(call["out"].plan, one)
        inside = first.view(-1)[: getattr(out.plan, other).numel()]
        inside = inside.view(getattr(out.plan, other).shape)
        call["out"] = out._replace(plan=out.plan._replace(**{other: inside}))
        refused(route, ValueError, "^out: .* that overlap", call, tensors_of(call["out"]))


def test_a_call_that_was_refused_is_not_remembered_as_good():
    route = Router(SOFTMAX)
    for _ in range(2):
        call = call_of(SOFTMAX)
        out = call["out"]
        wrong = out._replace(plan=out.plan._replace(inverse=out.ids))
        refused(route, ValueError, "^out: ", call | {"out": wrong}, tensors_of(out))
        route.with_plan(**call)


WRONG = [
    ("block", {"block": 0}),
    ("block", {"block": "4"}),
    ("block", {"block": True}),
    ("block", {"block": [4]}),
    ("block", {"block": 2**31}),
    ("block", {"masked": True}),
    ("capacity", {"capacity": 0}),
    ("capacity", {"capacity": 3.0}),
    ("capacity", {"capacity": None, "drop": "least_weight"}),
    ("drop", {"drop": "first"}),
    ("drop", {"drop": ["last"]}),
    ("masked", {"masked": 0}),
    ("num_experts", {"num_experts": 0}),
    ("num_experts", {"num_experts": 8.0}),
    ("num_experts", {"num_experts": 4097}),
    ("num_experts", {"num_experts": None}),
    ("num_valid_tokens", {"num_valid_tokens": -1}),
    ("topk", {"topk": True}),
    ("out", {"block": 5}),
    ("out", {"block": None}),
    ("out", {"num_experts": 9}),
    ("out", {"ids_dtype": torch.int64}),
]


@pytest.mark.parametrize(("name", "wrong"), WRONG)
def test_a_wrong_argument_is_named_before_anything_is_written(name, wrong):
    route = Router(SOFTMAX)
    call = call_of(SOFTMAX)
    for _ in range(3):
        refused(route, (TypeError, ValueError), f"^{name}: ", call | wrong, tensors_of(call["out"]))
        route.with_plan(**call)


def with_part(out, name, part):
    return out._replace(plan=out.plan._replace(**{name: part}))


WRONG_PARTS = {
    "too long": lambda part: torch.zeros(len(part) + 1, *part.shape[1:], dtype=torch.int32),
    "int64": lambda part: part.long(),
    "strided": lambda part: torch.zeros(*part.shape, 2, dtype=torch.int32)[..., 0],
    "meta": lambda part: part.to("meta"),
    "absent": lambda _: None,
    "a list": lambda part: part.tolist(),
    "zeros without memory": lambda part: torch._efficientzerotensor(part.shape, dtype=torch.int32),
    "nested": lambda part: torch.nested.nested_tensor([part.view(-1)]),
    "sparse": lambda part: part.to_sparse(),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("how", WRONG_PARTS)
@pytest.mark.parametrize("name", PARTS)
def test_a_part_that_cannot_be_filled_is_refused_before_anything_is_written(name, how):
    route, call = Router(SOFTMAX), call_of(SOFTMAX)
    part = WRONG_PARTS[how](getattr(call["out"].plan, name))
    wrong = with_part(call["out"], name, part)
    if how == "strided" and wrong.plan[PARTS.index(name)].is_contiguous():
        return  # of one element
    for _ in range(3):
        refused(
            route, (TypeError, ValueError), f"^out: expected .*{name}", call | {"out": wrong},
            tensors_of(call["out"]),
        )  # fmt: skip
        route.with_plan(**call)


def test_a_part_in_the_place_of_another_is_refused():
    """Both have one element, so only their places tell them apart."""
    route = Router(SOFTMAX)
    logits = torch.randn(1, E)
    out = emptied(route.with_plan(logits, 1, block=1))
    assert out.plan.block_experts.shape == (1,)
    wrong = with_part(with_part(out, "num_dropped", out.plan.block_experts), "block_experts", None)
    for _ in range(3):
        with pytest.raises(TypeError, match=r"^out: .* for block_experts, got None"):
            route.with_plan(logits, 1, block=1, out=wrong)
        route.with_plan(logits, 1, block=1, out=out)


FULL = Router(SOFTMAX).with_plan(torch.randn(T, E), K)
TEXTS = [
    (5, "a RoutedPlan (weights, ids, plan), got 5"),
    ([1, 2, 3], "a RoutedPlan (weights, ids, plan), got [1, 2, 3]"),
    ((1, 2), "a RoutedPlan (weights, ids, plan), got (1, 2)"),
    ((1, 2, 3), "a RoutedPlan (weights, ids, plan) with a Tensor for weights, got 1"),
    (
        (FULL.weights, None, FULL.plan),
        "a RoutedPlan (weights, ids, plan) with a Tensor for ids, got None",
    ),
    (
        (FULL.weights, FULL.ids, None),
        "a RoutedPlan (weights, ids, plan) with a DispatchPlan for plan, got None",
    ),
    (
        FULL._replace(plan=tuple(FULL.plan)),
        "a RoutedPlan (weights, ids, plan) with a DispatchPlan for plan, got a tuple of 6 items",
    ),
]


@pytest.mark.parametrize(("out", "text"), TEXTS)
def test_an_out_of_another_kind_is_named(out, text):
    route, logits = Router(SOFTMAX), torch.randn(T, E)
    for _ in range(2):
        with pytest.raises(TypeError) as raised:
            route.with_plan(logits, K, out=out)
        assert str(raised.value) == f"out: expected {text}"
        route.with_plan(logits, K, out=tuple(FULL))  # a plain tuple of the parts will do


def test_sizes_are_refused_by_the_names_of_this_call():
    """It has no argument ``ids``."""
    many = torch.randn(1, E).expand(2**30, E)
    for spec, logits, topk, text in (
        (SOFTMAX, torch.randn(2, 128), 65, "topk: expected topk + shared_experts up to 64, "),
        (SHARED, torch.randn(2, 128), 63, "topk: expected topk + shared_experts up to 64, "),
        (SOFTMAX, torch.randn(2, 4097), 1, "logits: expected E + shared_experts up to 4096, "),
        (SHARED, torch.randn(2, 4095), 1, "logits: expected E + shared_experts up to 4096, "),
        (SOFTMAX, many, K, "logits: expected T * (topk + shared_experts) up to 2147483647, "),
    ):
        with pytest.raises(ValueError, match="^" + re.escape(text)):
            Router(spec).with_plan(logits, topk)
    for columns, topk in ((4096, 64), (5000, 1)):
        made = Router(SOFTMAX).with_plan(torch.randn(2, columns), topk, num_experts=4096)
        same(made.plan, oracle(made, 4096))


# Modes


def test_a_plan_made_in_inference_mode_is_refused_outside():
    route, logits = Router(SOFTMAX), torch.randn(T, E)
    with torch.inference_mode():
        made = route.with_plan(logits, K)
    out = RoutedPlan(torch.empty(T, K), torch.empty(T, K, dtype=torch.int32), made.plan)
    for _ in range(3):
        with torch.inference_mode():
            same(route.with_plan(logits, K, out=out).plan, oracle(out, E))
        with pytest.raises(ValueError, match=r"^out: expected order that can be written here"):
            route.with_plan(logits, K, out=out)
        same(route.with_plan(logits, K).plan, made.plan)


@pytest.mark.parametrize("asked", [PLANS["blocks"], PLANS["blocks, least weight"]])
def test_gradients_are_those_of_a_call_without_a_plan(asked):
    route, gradients = Router(SCALED), []
    upstream, logits, scale = torch.randn(T, K), torch.randn(T, E), torch.rand(E)
    for call in (route, *[lambda *some: route.with_plan(*some[:1], K, some[2], **asked)] * 3):
        x, s = logits.clone().requires_grad_(), scale.clone().requires_grad_()
        made = call(x, K, s)
        made.weights.backward(upstream)
        gradients.append((x.grad, s.grad))
        assert not made.ids.requires_grad
    for x, s in gradients[1:]:
        assert torch.equal(x, gradients[0][0])
        assert torch.equal(s, gradients[0][1])
    same(made.plan, oracle(made, E, **asked))
    with pytest.raises(ValueError, match=r"^out: expected None where gradients are wanted"):
        route.with_plan(logits.requires_grad_(), K, scale, **asked, out=emptied(made))


@pytest.fixture
def _no_vmap_fallback():
    """Let torch.func.vmap refuse operators that have no rule of their own for batches."""
    torch._C._functorch._set_vmap_fallback_enabled(False)  # noqa: FBT003 -- its own signature
    yield
    torch._C._functorch._set_vmap_fallback_enabled(True)  # noqa: FBT003 -- its own signature


@pytest.mark.usefixtures("_no_vmap_fallback")
@pytest.mark.parametrize("plan", PLANS)
def test_vmap_plans_each_element(plan):
    """The outputs of torch.func.vmap are tensors: a part that a plan lacks is left out."""
    route, batch = Router(SOFTMAX), torch.randn(3, T, E)
    step = lambda logits: tuple(tensors_of(route.with_plan(logits, K, **PLANS[plan])))  # noqa: E731
    made = torch.func.vmap(step)(batch)
    for n, logits in enumerate(batch):
        for one, other in zip(made, step(logits), strict=True):
            assert torch.equal(one[n], other)
    out = emptied(route.with_plan(batch[0], K, **PLANS[plan]))
    with pytest.raises(ValueError, match=r"^out: expected None where gradients are wanted"):
        torch.func.vmap(lambda x: route.with_plan(x, K, **PLANS[plan], out=out).ids)(batch)
    with pytest.raises(ValueError, match=r"^out: expected None inside a transform of torch.func"):
        torch.func.vmap(lambda ids: moe_routing.plan(ids, E, out=FULL.plan).order)(
            torch.zeros(3, T, K, dtype=torch.int32)
        )


# Which backend

CALLS = []


def build_recorded(problem, device):
    """Build `eager`'s kernel, and write each call down."""
    kernel = registry().build("eager", problem, device)

    def recorded(*arguments, **named):
        CALLS.append((problem.operation, type(arguments[0])))
        return kernel(*arguments, **named)

    return recorded


@pytest.fixture
def recorded():
    """Register a backend of both operations that writes its calls down, and yield its name."""
    factories = dict.fromkeys(("route", "plan"), f"{__name__}:build_recorded")
    registry().register(BackendSpec(name="recorded", factories=factories, targets=(Target("*"),)))
    CALLS.clear()
    yield "recorded"
    registry().unregister("recorded")


def test_a_preferred_backend_does_both_in_later_calls_too(recorded):
    route, logits = Router(SOFTMAX), torch.randn(T, E)
    both = [("route", torch.Tensor), ("plan", torch.Tensor)]
    named = Router(SOFTMAX, backend=recorded)
    for _ in range(3):
        CALLS.clear()
        route.with_plan(logits, K)
        assert not CALLS
        with moe_routing.prefer(recorded):
            made = route.with_plan(logits, K)
            assert both == CALLS
            assert route.report.winner == recorded
            assert f"with_plan: composed of two operations, plan by {recorded!r}" in (
                route.report.notes
            )
        with moe_routing.prefer("eager"):
            same(named.with_plan(logits, K).plan, made.plan)
        assert both * 2 == CALLS


class Subclass(torch.Tensor):
    """A tensor as users derive one, without code of its own."""


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    "other",
    [lambda t: t.as_subclass(Subclass), lambda t: torch._neg_view(-t)],
    ids=["a subclass", "negated lazily"],
)
def test_logits_that_are_no_plain_memory_are_planned_by_the_named_backend(recorded, other, plan):
    route, logits = Router(SOFTMAX, backend=recorded), torch.randn(T, E)
    expected, out = route.with_plan(logits, K, **PLANS[plan]), None
    for _ in range(3):
        CALLS.clear()
        made = route.with_plan(other(logits), K, **PLANS[plan], out=out)
        assert [operation for operation, _ in CALLS] == ["route", "plan"]
        assert all(map(torch.equal, tensors_of(made), tensors_of(expected)))
        out = emptied(expected)


def test_the_variable_counts_for_kinds_of_calls_that_nothing_was_chosen_for(recorded, monkeypatch):
    """As it does for the router and for ``plan``."""
    route = Router(SOFTMAX.replace(family="variable"))
    route.with_plan(torch.randn(T, E), K)
    monkeypatch.setenv("MOE_ROUTING_BACKEND", recorded)
    route.with_plan(torch.randn(T, E), K)
    assert not CALLS
    route.with_plan(torch.randn(T, E + 1), K)
    assert [("route", torch.Tensor), ("plan", torch.Tensor)] == CALLS


@pytest.mark.parametrize("with_out", [False, True])
@pytest.mark.parametrize("extra", [{}, {"num_valid_tokens": VALID}, {"num_valid_tokens": 3}])
@pytest.mark.parametrize("method", ["__call__", "with_plan"])
def test_no_kernel_is_called_where_operators_are_faked(recorded, method, extra, with_out):
    route, logits = Router(SOFTMAX, backend=recorded), torch.randn(T, E)
    call, out = getattr(route, method), None
    if with_out:
        out = emptied(FULL) if method == "with_plan" else emptied(FULL)[:2]
    for _ in range(3):
        call(logits, K, **extra, out=out)
        CALLS.clear()
        with FakeTensorMode(allow_non_fake_inputs=True):
            made = call(logits, K, **extra)
            assert type(made.weights) is FakeTensor
            call(logits, K, **extra, out=out)
        assert not CALLS


WRECK = """
from moe_routing_registry import BackendSpec, Target, hookimpl

def build(problem, device):
    raise RuntimeError("no such chip")

@hookimpl
def moe_routing_backends():
    factories = {"plan": "wreck_of_plans:build"}
    every = (Target("*"),)
    return [BackendSpec(name="wreck-of-plans", factories=factories, targets=every, priority=900)]
"""


def test_in_strict_mode_nothing_is_written_where_the_plan_is_not_had_from_the_best(
    install_plugin, monkeypatch
):
    install_plugin("wreck_of_plans", WRECK)
    importlib.import_module("wreck_of_plans")
    monkeypatch.setattr(registry(), "_inventory", None)
    monkeypatch.setenv("MOE_ROUTING_STRICT", "1")
    call = {"logits": torch.randn(T, E + 3), "topk": K, "out": None}
    with pytest.raises(moe_routing.BackendUnavailableError, match="MOE_ROUTING_STRICT"):
        Router(SOFTMAX).with_plan(**call)
    monkeypatch.delenv("MOE_ROUTING_STRICT")
    with pytest.warns(moe_routing.DowngradeWarning, match=r"wreck-of-plans.*no such chip"):
        call["out"] = emptied(Router(SOFTMAX).with_plan(**call))
    monkeypatch.setenv("MOE_ROUTING_STRICT", "1")
    refused(
        Router(SOFTMAX), moe_routing.BackendUnavailableError, "MOE_ROUTING_STRICT", call,
        tensors_of(call["out"]),
    )  # fmt: skip


def test_the_report_of_the_router_says_how_it_plans():
    route, said = Router(SOFTMAX), "with_plan: composed of two operations, plan by 'eager'"
    route(torch.randn(T, E), K)
    assert said not in route.report.notes
    for _ in range(3):
        route.with_plan(torch.randn(T, E), K)
        assert route.report.notes.count(said) == 1
        route.with_plan(torch.randn(T, E), K, block=4)
        assert route.report.notes.count(said) == 1
    assert said in moe_routing.explain("mixtral").notes


# Compilers


@pytest.mark.parametrize(
    "spec", [pytest.param(SHARED, marks=pytest.mark.slow), BIASED], ids=["shared", "bias"]
)
def test_it_compiles_as_one_graph_for_any_number_of_tokens(spec):
    route, experts = Router(spec), E + spec.shared_experts

    def step(given_, out=None):
        return route.with_plan(topk=K, **given_, **PLANS["blocks, least weight"], out=out)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (7, 12, 3):
        given_ = operands_of(spec, tokens)
        made, expected = compiled(given_), step(given_)
        assert type(made) is RoutedPlan
        assert all(map(torch.equal, tensors_of(made), tensors_of(expected)))
        same(made.plan, oracle(made, experts, **PLANS["blocks, least weight"]))
    out = emptied(expected)
    filled = torch.compile(step, fullgraph=True, backend="aot_eager")(given_, out)
    assert all(map(torch.equal, tensors_of(out), tensors_of(expected)))
    assert all(map(torch.equal, tensors_of(filled), tensors_of(expected)))


STEP = """
import sys, torch, moe_routing
loaded = torch.export.load(sys.argv[1]).module()
logits, expected = torch.load(sys.argv[2], weights_only=False)
made = loaded(logits)
assert type(made) is moe_routing.planning.RoutedPlan, made
assert type(made.plan) is moe_routing.DispatchPlan, made
for one, other in zip((*made[:2], *made.plan), (*expected[:2], *expected.plan), strict=True):
    assert one is other is None or torch.equal(one, other)
"""


@pytest.mark.slow
def test_a_saved_program_that_returns_a_routed_plan_is_loaded_in_another_process(tmp_path):
    route, files = Router(SHARED), [tmp_path / "step.pt2", tmp_path / "expected.pt"]

    class Step(torch.nn.Module):
        def forward(self, logits):
            return route.with_plan(logits, K, **PLANS["blocks"])

    tokens, logits = torch.export.Dim("tokens", min=2, max=512), torch.randn(3, E)
    program = torch.export.export(Step(), (torch.randn(7, E),), dynamic_shapes=({0: tokens},))
    torch.export.save(program, files[0])
    torch.save((logits, Step()(logits)), files[1])
    subprocess.run([sys.executable, "-c", STEP, *map(str, files)], check=True)


def test_a_program_that_returns_a_routed_plan_can_be_saved(tmp_path):
    class Step(torch.nn.Module):
        def forward(self, logits):
            return Router(SOFTMAX).with_plan(logits, K)

    torch.export.save(torch.export.export(Step(), (torch.randn(7, E),)), tmp_path / "step.pt2")
    logits = torch.randn(7, E)
    made = torch.export.load(tmp_path / "step.pt2").module()(logits)
    same(made.plan, Step()(logits).plan)


# Several processes

SHARDED = """
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
import moe_routing

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
def spread(tensor):
    return distribute_tensor(tensor, mesh, [Shard(0)])
route, logits = moe_routing.get_router("mixtral"), torch.randn(4, 8)
for call, name in (
    (lambda: route.with_plan(spread(logits), 2), "logits"),
    (lambda: moe_routing.plan(spread(torch.zeros(4, 2, dtype=torch.int32)), 8), "ids"),
):
    try:
        call()
    except TypeError as error:
        assert str(error).startswith(f"{name}: expected a tensor of this process"), error
    else:
        raise AssertionError(name)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_dtensor_is_refused_by_name():
    """A plan has places of one process; each rank plans its own rows."""
    subprocess.run([sys.executable, "-c", SHARDED], check=True)
