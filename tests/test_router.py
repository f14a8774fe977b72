from __future__ import annotations

import dataclasses
import threading

import pytest
import torch

import moe_routing
from moe_routing import Router, RoutingSpec, _dispatch
from moe_routing._registry import registry
from moe_routing_registry import (
    BackendSpec,
    BackendUnavailableError,
    RejectCode,
    Target,
    UnknownNameError,
    Verdict,
)
from moe_routing_registry.errors import DowngradeWarning

LOGITS = torch.tensor([[0.0, 3.0, 1.0, 2.0], [5.0, 5.0, -1.0, 5.0]])
BUILT = []


def constant(value):
    """Return a factory whose backend gives every token the expert ``value``."""

    def build(problem, device):
        BUILT.append((problem, device))

        def bound(logits, **_operands):
            shape = (logits.shape[0], problem.topk)
            return moe_routing.RoutingOutput(
                torch.ones(shape), torch.full(shape, value, dtype=torch.int32)
            )

        return bound

    return build


build_seven = constant(7)
build_nine = constant(9)


def build_broken(_problem, _device):
    msg = "no compiler here"
    raise RuntimeError(msg)


@pytest.fixture
def add_backend():
    """Register backends by hand, and take them out again."""
    added = []

    def add(name, factory, priority=-1, **fields):
        registry().register(
            BackendSpec(
                name=name,
                factories={"route": f"{__name__}:{factory}"},
                targets=(Target("cpu"),),
                priority=priority,
                **fields,
            )
        )
        added.append(name)

    BUILT.clear()
    yield add
    for name in added:
        registry().unregister(name)


def fresh_router(backend=None):
    return Router(RoutingSpec(family="topk_softmax", renormalize=True), backend=backend)


def test_a_router_is_had_by_model_name_by_family_name_and_by_spec():
    by_model = moe_routing.get_router("mixtral")
    by_family = moe_routing.get_router("topk_softmax")
    by_spec = moe_routing.get_router(RoutingSpec(family="mine", renormalize=True))
    for route in (by_model, by_family, by_spec):
        weights, ids = route(LOGITS, 2)
        assert ids.tolist() == [[1, 3], [0, 1]]
        assert ids.dtype is torch.int32
        assert weights.dtype is torch.float32
        torch.testing.assert_close(weights.sum(-1), torch.ones(2))


def test_the_same_question_gives_the_same_router():
    assert moe_routing.get_router("gemma4") is moe_routing.get_router("gemma4")
    assert moe_routing.get_router("gemma4") is not moe_routing.get_router("gemma4", backend="eager")


def test_the_report_says_who_won_and_why():
    route = fresh_router()
    assert route.backend is None
    assert route.report is None
    route(LOGITS, 2)
    assert route.backend == "eager"
    assert route.report.asked_by == "probe"
    assert route.report.device.type == "cpu"
    assert "the best that fits" in str(route.report)


def test_prefer_holds_inside_its_block_only(add_backend):
    add_backend("seven", "build_seven")
    route = fresh_router()
    with moe_routing.prefer("seven"):
        assert route(LOGITS, 2).ids[0, 0] == 7
        assert route.report.asked_by == "context"
    assert route(LOGITS, 2).ids[0, 0] == 1


def test_prefer_does_not_leak_into_other_threads(add_backend):
    add_backend("seven", "build_seven")
    route, seen = fresh_router(), []
    with moe_routing.prefer("seven"):
        thread = threading.Thread(target=lambda: seen.append(route(LOGITS, 2).ids[0, 0].item()))
        thread.start()
        thread.join()
    assert seen == [1]


def test_a_named_backend_beats_prefer(add_backend):
    add_backend("seven", "build_seven")
    add_backend("nine", "build_nine")
    with moe_routing.prefer("seven"):
        assert fresh_router(backend="nine")(LOGITS, 2).ids[0, 0] == 9


def test_the_environment_names_a_backend(add_backend, monkeypatch):
    add_backend("seven", "build_seven")
    monkeypatch.setenv("MOE_ROUTING_BACKEND", "seven")
    route = fresh_router()
    assert route(LOGITS, 2).ids[0, 0] == 7
    assert route.report.asked_by == "environment"


def test_a_factory_that_fails_warns_once_and_the_next_backend_routes(add_backend):
    add_backend("broken", "build_broken", priority=999)
    route = fresh_router()
    with pytest.warns(
        DowngradeWarning,
        match=r"'eager', not with 'broken', which its factory raised RuntimeError: no compiler",
    ):
        assert route(LOGITS, 2).ids[0, 0] == 1
    assert route.report.rejection("broken").verdict.code is RejectCode.FACTORY_FAILED
    route(LOGITS, 2)
    fresh_router()(LOGITS, 2)  # warned already: warnings are errors here


def test_a_named_backend_whose_factory_fails_is_an_error_with_the_cause(add_backend):
    add_backend("broken2", "build_broken", priority=999)
    with pytest.raises(BackendUnavailableError, match="no compiler here") as caught:
        fresh_router(backend="broken2")(LOGITS, 2)
    assert isinstance(caught.value.__cause__.__cause__, RuntimeError)


def test_a_better_backend_out_of_reach_warns_with_the_command_that_mends_it(add_backend):
    add_backend("wanting", "build_seven", priority=999, requirements=("no-such-distribution",))
    with pytest.warns(DowngradeWarning, match="fix: pip install 'no-such-distribution'"):
        assert fresh_router()(LOGITS, 2).ids[0, 0] == 1


def test_a_downgrade_is_told_without_what_steers_a_terminal(add_backend, monkeypatch):
    add_backend("wanting3", "build_seven", priority=999, requirements=("no-such-distribution",))
    named = dataclasses.replace(moe_routing.probe("cpu"), name="\x1b[31m\u202eCPU")
    monkeypatch.setattr(_dispatch, "probe", lambda _device: named)
    with pytest.warns(DowngradeWarning, match=r"^cpu \(\[31mCPU, ") as told:
        fresh_router()(LOGITS, 2)
    assert str(told[0].message).isprintable()


def test_strict_turns_a_downgrade_into_an_error(add_backend, monkeypatch):
    add_backend("wanting2", "build_seven", priority=999, requirements=("no-such-distribution",))
    monkeypatch.setenv("MOE_ROUTING_STRICT", "1")
    with pytest.raises(BackendUnavailableError, match="MOE_ROUTING_STRICT is set and cpu"):
        fresh_router()(LOGITS, 2)


def test_where_no_backend_fits_the_error_lists_every_reason(add_backend):
    add_backend(
        "picky", "build_seven", supports=lambda _p, _d: Verdict.no(RejectCode.SHAPE, "wants E = 3")
    )
    with pytest.raises(BackendUnavailableError, match="wants E = 3"):
        fresh_router(backend="picky")(LOGITS, 2)


def test_32_threads_asking_at_once_get_one_router_one_kernel_and_one_probe(add_backend):
    add_backend("seven", "build_seven")
    spec = RoutingSpec(family="thirty_two", renormalize=True)
    start, seen = threading.Barrier(32), []

    def ask():
        start.wait()
        route = moe_routing.get_router(spec, backend="seven")
        route(LOGITS, 2)
        seen.append((route, route.resolve("cpu", torch.float32, 4, 2).kernel))

    threads = [threading.Thread(target=ask) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 32
    assert len({id(route) for route, _ in seen}) == 1
    assert len({id(bound) for _, bound in seen}) == 1
    assert len(BUILT) == 1


def test_a_backend_is_asked_for_what_the_call_needs(add_backend):
    add_backend("seven", "build_seven")
    route = fresh_router(backend="seven")
    route(LOGITS.to(torch.bfloat16).t().contiguous().t(), 2, ids_dtype=torch.int64)
    problem, device = BUILT[-1]
    assert (problem.num_experts, problem.topk, problem.dtype, problem.ids_dtype) == (
        4,
        2,
        "bfloat16",
        "int64",
    )
    assert (problem.layout, problem.training, device.type) == ("strided", False, "cpu")


def test_no_tokens_launch_nothing(add_backend):
    add_backend("seven", "build_seven")
    weights, ids = fresh_router(backend="seven")(torch.empty(0, 4), 2, ids_dtype=torch.int64)
    assert (weights.shape, ids.shape) == ((0, 2), (0, 2))
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int64)
    assert BUILT == []


def test_warmup_builds_before_the_first_call(add_backend):
    add_backend("seven", "build_seven")
    route = fresh_router(backend="seven")
    report = route.warmup(4, 2, dtype=torch.float32, device="cpu")
    assert report.winner == "seven"
    assert len(BUILT) == 1
    route(LOGITS, 2)
    assert len(BUILT) == 1


def test_a_router_of_a_configuration_knows_topk_and_the_number_of_experts():
    config = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    route = moe_routing.get_router(config)
    assert route(LOGITS).ids.shape == (2, 2)
    with pytest.raises(
        ValueError,
        match=r"logits: expected num_experts = 4 columns, as the configuration says, got 3",
    ):
        route(LOGITS[:, :3])


def test_explain_never_raises(monkeypatch):
    assert moe_routing.explain("gemma4", device="cpu").winner == "eager"
    assert "unknown router 'gema4': did you mean 'gemma4'" in moe_routing.explain("gema4").error
    assert "cuda:99" in moe_routing.explain("gemma4", device="cuda:99").error
    assert "topk" in moe_routing.explain("gemma4", num_experts=4, topk=9).error
    assert "unknown backend 'eagr'" in moe_routing.explain("gemma4", backend="eagr").error
    assert moe_routing.explain(object()).winner is None
    monkeypatch.setenv("MOE_ROUTING_STRICT", "perhaps")
    assert "MOE_ROUTING_STRICT" in moe_routing.explain("gemma4").error


def test_lists_hold_what_get_router_takes():
    assert {"gemma4", "deepseek_v3", "topk_softmax", "mixtral"} <= set(moe_routing.list_routers())
    assert "eager" in moe_routing.list_backends()
    for name in moe_routing.list_routers():
        assert isinstance(moe_routing.get_router(name), Router)


@pytest.mark.parametrize(
    "call",
    [lambda: moe_routing.get_router("mixtral", backend="eagr"), lambda: moe_routing.prefer("eagr")],
)
def test_a_misspelt_backend_is_an_error_at_once(call):
    with pytest.raises(UnknownNameError, match="did you mean 'eager'"):
        call()


def test_a_model_whose_routing_cannot_be_expressed_says_why():
    with pytest.raises(ValueError, match="router: 'doge' cannot be expressed: "):
        moe_routing.get_router("doge")


def test_a_misspelt_router_lists_near_matches():
    with pytest.raises(
        UnknownNameError, match="unknown router 'qwen3_mo': did you mean 'qwen3_moe'"
    ):
        moe_routing.get_router("qwen3_mo")


SCALED = RoutingSpec(family="known", renormalize=True, per_expert_scale=True)
SCALE = torch.tensor([1.0, 2.0, 3.0, 4.0])
KNOWN_OUT = moe_routing.RoutingOutput(torch.empty(2, 2), torch.empty(2, 2, dtype=torch.int32))


@pytest.mark.parametrize(
    ("arguments", "operands", "named"),
    [
        ((LOGITS, True, SCALE), {}, "topk"),
        ((LOGITS, 2.0, SCALE), {}, "topk"),
        ((LOGITS.to_sparse(), 2, SCALE), {}, "logits"),
        ((LOGITS.tolist(), 2, SCALE), {}, "logits"),
        ((LOGITS, 2, SCALE.int()), {}, "per_expert_scale"),
        ((LOGITS, 2, SCALE[None]), {}, "per_expert_scale"),
        ((LOGITS, 2, SCALE.to("meta")), {}, "per_expert_scale"),
        ((LOGITS, 2, SCALE.numpy()), {}, "per_expert_scale"),
        ((LOGITS, 2, None), {}, "per_expert_scale"),
        ((LOGITS, 2, SCALE), {"bias": SCALE}, "bias"),
        ((LOGITS, 2, SCALE), {"ids_dtype": "int32"}, "ids_dtype"),
        ((LOGITS, 2, SCALE), {"ids_dtype": []}, "ids_dtype"),
        ((LOGITS, 2, SCALE), {"out": list(KNOWN_OUT)}, "out"),
        ((LOGITS, 2, SCALE), {"out": (KNOWN_OUT[0], KNOWN_OUT[1].t())}, "out"),
        ((LOGITS[:1], 2, SCALE), {"out": KNOWN_OUT}, "out"),
        ((LOGITS, 2, SCALE), {"out": KNOWN_OUT, "ids_dtype": torch.int64}, "out"),
    ],
)
def test_a_wrong_call_is_refused_after_a_right_one_that_is_much_like_it(arguments, operands, named):
    route = Router(SCALED)
    for right in ({}, {"out": KNOWN_OUT}, {"out": tuple(KNOWN_OUT)}) * 2:
        route(LOGITS, 2, SCALE, **right)
        with pytest.raises((TypeError, ValueError), match=f"^{named}: "):
            route(*arguments, **operands)


def test_a_known_call_is_checked_once_and_routes_as_the_first_one_did(monkeypatch):
    route, checked = Router(SCALED), []
    check = route._calls.checked
    monkeypatch.setattr(
        route._calls, "checked", lambda *call: (checked.append(call), check(*call))[1]
    )
    first = route(LOGITS, 2, SCALE)
    again = route(LOGITS, 2, SCALE)
    given = route(LOGITS, 2, SCALE, out=tuple(KNOWN_OUT))
    assert route(LOGITS, 2, SCALE, out=tuple(KNOWN_OUT)).weights is KNOWN_OUT.weights
    assert len(checked) == 2
    for output in (again, given):
        assert isinstance(output, moe_routing.RoutingOutput)
        assert torch.equal(output.weights, first.weights)
        assert torch.equal(output.ids, first.ids)


def test_a_known_call_that_wants_gradients_has_them():
    route, scale = Router(SCALED), SCALE.clone()
    assert not route(LOGITS, 2, scale).weights.requires_grad
    scale.requires_grad_()
    assert route(LOGITS, 2, scale).weights.requires_grad
    with torch.no_grad():
        assert not route(LOGITS, 2, scale).weights.requires_grad


def test_a_call_like_the_one_before_takes_one_look_at_its_tensors(monkeypatch):
    route = Router(SCALED)
    route(LOGITS, 2, SCALE, out=KNOWN_OUT)
    monkeypatch.setattr(
        "moe_routing._calls.described", lambda *_call: pytest.fail("the call was described")
    )
    other = moe_routing.RoutingOutput(
        torch.empty(len(LOGITS), 2), torch.empty(len(LOGITS), 2, dtype=torch.int32)
    )
    assert route(LOGITS + 1, 2, SCALE, out=other) is other
    assert torch.equal(other.ids, KNOWN_OUT.ids)


def test_a_torch_without_the_guard_routes_all_the_same(monkeypatch):
    def other(*_tensors):
        raise TypeError

    monkeypatch.setattr("torch._C._dynamo.guards.TensorGuards", other)
    route = Router(SCALED)
    first, again = (route(LOGITS, 2, SCALE) for _ in range(2))
    assert torch.equal(first.weights, again.weights)
    assert len(route._calls.cache) == 1


def test_a_call_in_inference_mode_is_of_another_kind_and_routes_as_outside():
    route = Router(SCALED)
    expected = [route(LOGITS, 2, SCALE) for _ in range(2)][-1]
    with torch.inference_mode():
        inside = [route(LOGITS.clone(), 2, SCALE) for _ in range(2)]
    for output in (*inside, route(LOGITS, 2, SCALE)):
        assert torch.equal(output.weights, expected.weights)
    assert len(route._calls.cache) == 2


def test_other_strides_are_another_call():
    route, wide = Router(SCALED), torch.stack([SCALE, -SCALE], 1)
    expected = route(LOGITS, 2, SCALE)
    for logits, scale in ((LOGITS.t().contiguous().t(), SCALE), (LOGITS, wide[:, 0])):
        for _ in range(2):
            output = route(logits, 2, scale)
            assert torch.equal(output.weights, expected.weights)
            assert torch.equal(output.ids, expected.ids)


def test_a_router_remembers_a_bounded_number_of_kinds_of_call(monkeypatch):
    monkeypatch.setattr("moe_routing._calls._CACHE_SIZE", 5)
    route = Router(SCALED)
    for tokens in range(1, 20):
        route(torch.randn(tokens, 4), 2, SCALE)
        assert len(route._calls.cache) <= 5


class Preparing:
    """A kernel that prepares for calls like one that it has seen."""

    def __init__(self):
        self.prepared_for = []

    def __call__(self, logits, **_operands):
        return moe_routing.RoutingOutput(
            torch.ones(len(logits), 2), torch.full((len(logits), 2), 1, dtype=torch.int32)
        )

    def prepared(self, operands):
        self.prepared_for.append(
            (tuple(operands.logits.shape), operands.per_expert_scale, operands.bias)
        )
        if len(operands.logits) == 1:
            return None

        def route(operands):
            logits = operands.logits
            return moe_routing.RoutingOutput(
                torch.ones(len(logits), 2), torch.full((len(logits), 2), 2, dtype=torch.int32)
            )

        return route


def build_preparing(_problem, _device):
    return Preparing()


def test_a_kernel_may_prepare_for_later_calls_of_a_kind(add_backend):
    add_backend("preparing", "build_preparing")
    route = fresh_router(backend="preparing")
    assert [route(LOGITS, 2).ids[0, 0].item() for _ in range(3)] == [1, 2, 2]
    assert [route(LOGITS[:1], 2).ids[0, 0].item() for _ in range(3)] == [1, 1, 1]
    kernel = route.resolve("cpu", torch.float32, 4, 2).kernel
    assert kernel.prepared_for == [((2, 4), None, None), ((1, 4), None, None)]


def test_a_watched_router_sees_every_call_whatever_the_kernel_prepares(add_backend):
    add_backend("preparing", "build_preparing")
    route = Router(
        RoutingSpec(family="topk_softmax", renormalize=True), backend="preparing", verify=True
    )
    for _ in range(3):
        route(LOGITS, 2)
    assert route.health().compared == 3


@pytest.mark.parametrize("mapped", [False, True])
def test_tokens_without_experts_have_no_gradient(mapped):
    spec = RoutingSpec(
        family="f",
        score="sigmoid",
        selection="token_table",
        renormalize=True,
        per_expert_scale=True,
        shared_experts=1,
    )
    table = torch.tensor([[0, 1], [2, 3], [3, 4], [1, 2**32 + 1]])
    logits, scale = torch.randn(5, 4, requires_grad=True), torch.ones(4, requires_grad=True)
    expert_map = torch.tensor([7, 5, 6, 8, 9]) if mapped else None
    tokens = torch.tensor([1, 4, -1, 2, 3])
    weights, ids = Router(spec)(
        logits,
        2,
        per_expert_scale=scale,
        token_ids=tokens,
        expert_table=table,
        expert_map=expert_map,
    )
    (weights[:, :2] * torch.tensor([1.0, 2.0])).sum().backward()
    assert ids.tolist() == [[6, 8, 9] if mapped else [2, 3, 4]] + [[-1, -1, -1]] * 4
    assert weights[1:].eq(0).all()
    assert logits.grad[1:].eq(0).all()
    assert logits.grad[0, 2:].ne(0).all()
    assert scale.grad[:2].eq(0).all()
    with pytest.raises(
        ValueError, match=r"expert_table: expected a vocabulary of at least 1 token, got \[0, 2\]"
    ):
        Router(spec)(logits, 2, per_expert_scale=scale, token_ids=tokens, expert_table=table[:0])
