"""One dispatcher for plain, traced and training calls.

The tests count what it builds, how often, and what a warm call costs.
"""

from __future__ import annotations

import sys
import threading
import warnings

import pytest
import torch

import moe_routing
from moe_routing import Router, RoutingOutput, RoutingSpec
from moe_routing._registry import registry
from moe_routing_registry import BackendSpec, BackendUnavailableError, RejectCode, Target

SPEC = RoutingSpec(family="dispatched", renormalize=True, per_expert_scale=True)
BUILT = []
E, K = 16, 4


class Noted:
    """A kernel that routes as eager does, and notes what is called."""

    def __init__(self, problem, device):
        from moe_routing_backends.eager.route import build

        self.eager, self.called = build(problem, device), []

    def __call__(self, logits, **operands):
        self.called.append("call")
        return self.eager(logits, **operands)

    def warmup(self):
        self.called.append("warmup")

    def backward(self, grad_weights, logits, _ids, per_expert_scale):
        self.called.append(f"backward {grad_weights.is_contiguous()}")
        return torch.zeros_like(logits), torch.zeros_like(per_expert_scale)


def build_noted(problem, device):
    kernel = Noted(problem, device)
    BUILT.append(kernel)
    return kernel


def build_warning(problem, device):
    warnings.warn("a compiler's remark", stacklevel=1)
    return build_noted(problem, device)


def build_routing(problem, device):
    """Route other problems before the kernel of this one exists.

    One is routed in this thread, and one in another.
    """
    route = Router(problem.spec, backend="recursive")
    if problem.num_experts == E:
        route(torch.randn(3, 2 * E), K, torch.rand(2 * E))
        other = threading.Thread(target=lambda: route(torch.randn(3, 3 * E), K, torch.rand(3 * E)))
        other.start()
        other.join()
    return build_noted(problem, device)


def build_routing_itself(problem, _device):
    Router(problem.spec, backend="itself")(torch.randn(3, E), K, torch.rand(E))


class NotedBadly(Noted):
    """A kernel that routes, and has nothing sensible to say of itself."""

    NOTES = None

    @property
    def notes(self):
        if isinstance(self.NOTES, type):
            raise self.NOTES
        return self.NOTES


def build_noted_badly(problem, device):
    return NotedBadly(problem, device)


class Classless:
    """A kernel that hands everything on, its class too, and has nobody to hand it to."""

    @property
    def __class__(self):
        return {}["__class__"]

    def __call__(self, logits, **operands):
        raise AssertionError(logits, operands)


def build_classless(_problem, _device):
    return Classless()


def build_number(problem, device):
    kernel = build_noted(problem, device)
    kernel.warmup = 3
    return kernel


@pytest.fixture
def add_backend():
    added = []

    def add(name, factory):
        registry().register(
            BackendSpec(
                name=name, factories={"route": f"{__name__}:{factory}"}, targets=(Target("cpu"),)
            )
        )
        added.append(name)

    BUILT.clear()
    yield add
    for name in added:
        registry().unregister(name)


def operands(tokens=5, **changes):
    return {
        "logits": torch.randn(tokens, E),
        "topk": K,
        "per_expert_scale": torch.rand(E),
        **changes,
    }


def test_a_problem_is_built_once_for_plain_traced_and_training_calls(add_backend):
    add_backend("noted", "build_noted")
    route = Router(SPEC, backend="noted")
    route.warmup(E, K, dtype=torch.float32, training=True)
    given = operands()
    route(**given)
    torch.compile(route.__call__, fullgraph=True, backend="aot_eager")(**given)
    scale = given["per_expert_scale"].clone().requires_grad_()
    for call in (
        route,
        torch.compile(route.__call__, fullgraph=True, backend="aot_eager"),
        Router(SPEC, backend="noted"),
    ):
        call(**{**given, "per_expert_scale": scale}).weights.sum().backward()
    torch.func.grad(lambda logits: route(logits, K, scale.detach()).weights.sum())(given["logits"])
    (kernel,) = BUILT
    assert kernel.called.count("warmup") == 1
    assert kernel.called.count("backward True") == 5  # one of them by warmup
    assert {"call", "warmup", "backward True"} == set(kernel.called)


def test_a_kernel_that_was_built_for_training_serves_plain_calls(add_backend):
    add_backend("noted", "build_noted")
    route, given = Router(SPEC, backend="noted"), operands()
    route(**{**given, "logits": given["logits"].clone().requires_grad_()})
    route(**given)
    moe_routing.get_router(SPEC, backend="noted")(**given)
    assert len(BUILT) == 1


def test_another_ids_dtype_layout_or_size_is_another_problem(add_backend):
    add_backend("noted", "build_noted")
    route = Router(SPEC, backend="noted")
    for changes in ({}, {"ids_dtype": torch.int64}, {"logits": torch.randn(E, 5).t()}, {"topk": 2}):
        route(**operands(**changes))
    assert len(BUILT) == 4


def build_plan(problem, device):
    from moe_routing_backends.eager.plan import build

    BUILT.append(problem)
    return build(problem, device)


def test_a_backend_of_another_operation_that_is_registered_again_is_built_again():
    factories = {"plan": f"{__name__}:build_plan"}
    BUILT.clear()
    for _ in range(2):
        registry().register(
            BackendSpec(name="plans", factories=factories, targets=(Target("cpu"),))
        )
        try:
            for _ in range(2):
                moe_routing.plan(torch.zeros(3, 2, dtype=torch.int32), 4, backend="plans")
        finally:
            registry().unregister("plans")
    assert len(BUILT) == 2


def test_a_backend_that_is_registered_again_is_built_again(add_backend):
    add_backend("noted", "build_noted")
    Router(SPEC, backend="noted")(**operands())
    registry().unregister("noted")
    registry().register(
        BackendSpec(
            name="noted", factories={"route": f"{__name__}:build_noted"}, targets=(Target("cpu"),)
        )
    )
    Router(SPEC, backend="noted")(**operands())
    assert len(BUILT) == 2


def test_a_warning_of_a_factory_is_shown_and_never_its_error(add_backend):
    add_backend("warning", "build_warning")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("error")
        Router(SPEC, backend="warning")(**operands())
        assert warnings.filters[0][0] == "error"
    assert [str(w.message) for w in caught] == ["a compiler's remark"]


def test_a_factory_may_route(add_backend):
    add_backend("recursive", "build_routing")
    Router(SPEC, backend="recursive")(**operands())
    assert len(BUILT) == 3


def test_a_factory_that_routes_what_it_builds_fails_with_a_sentence(add_backend):
    add_backend("itself", "build_routing_itself")
    with pytest.raises(
        BackendUnavailableError,
        match="routed dispatched E=16 K=4 float32, the problem that it is building",
    ):
        Router(SPEC, backend="itself")(**operands())


def test_a_score_that_nobody_can_differentiate_is_refused_for_training_only(add_backend):
    add_backend("noted", "build_noted")
    registry().register(
        BackendSpec(
            name="plain", factories={"route": f"{__name__}:build_plain"}, targets=(Target("cpu"),)
        )
    )
    try:
        route = Router(RoutingSpec(family="cubic", score="cube"), backend="plain")
        route(torch.randn(3, E), K)
        said = "and the built-in gradient does not know the score function 'cube'"
        with pytest.raises(BackendUnavailableError, match=f"has no `backward`, {said}"):
            route(torch.randn(3, E, requires_grad=True), K)
    finally:
        registry().unregister("plain")


def build_plain(problem, _device):
    return lambda logits, **_operands: RoutingOutput(
        torch.ones(len(logits), problem.topk),
        torch.zeros(len(logits), problem.topk, dtype=torch.int32),
    )


def our_frames(call):
    """Count the Python functions of this project that a warm call enters."""
    for _ in range(3):
        call()
    names = []

    def note(frame, event, _argument):
        if event == "call" and "/moe_routing" in frame.f_code.co_filename:
            names.append(frame.f_code.co_name)

    previous = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(previous)
    return names


SOFTMAX = RoutingSpec(family="warm", renormalize=True)


@pytest.mark.parametrize("tokens", [1, 64, 512])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_warm_eager_call_enters_ten_functions_or_fewer(tokens, scaled):
    route = Router(SOFTMAX.replace(per_expert_scale=scaled), backend="eager")
    logits, scale = torch.randn(tokens, 128), torch.rand(128) if scaled else None
    # Rounds of a maximum, for many scores, read the ids back in a function of their own.
    rounds = ["ordered_keys", *["_id_of"] * 9] if tokens == 512 else []
    assert len(our_frames(lambda: route(logits, 8, scale))) <= 10 + len(rounds)


class Ready:
    """A kernel that prepares one function for calls like an earlier one, as Triton's does."""

    def __init__(self, problem, device):
        from moe_routing_backends.eager.route import build

        self.eager = build(problem, device)

    def __call__(self, logits, **operands):
        return self.eager(logits, **operands)

    def prepared(self, operands):
        result = self.eager.route(operands)
        return lambda _operands: result


def build_ready(problem, device):
    return Ready(problem, device)


@pytest.mark.parametrize("gradients", [False, True])
def test_a_warm_call_of_a_prepared_kernel_enters_two_functions_of_the_router(
    add_backend, gradients
):
    add_backend("ready", "build_ready")
    route, given = Router(SPEC, backend="ready"), operands()
    given["logits"].requires_grad_(gradients)
    with torch.no_grad():
        assert our_frames(lambda: route(**given)) == [
            "__call__",
            "matches",
        ]  # and the kernel's own: 3


def test_a_warm_training_step_enters_twenty_functions_or_fewer():
    route = Router(SOFTMAX.replace(per_expert_scale=True), backend="eager")
    logits, scale = torch.randn(64, 128, requires_grad=True), torch.rand(128)
    ones = torch.ones(64, 8)
    assert len(our_frames(lambda: route(logits, 8, scale).weights.backward(ones))) <= 20


@pytest.mark.parametrize(
    "extra", ["num_valid_tokens=tensor", "num_valid_tokens=int", "expert_map", "token table"]
)
def test_padding_tables_and_maps_are_checked_once(extra, monkeypatch):
    by_table = extra == "token table"
    spec = SOFTMAX.replace(selection="token_table") if by_table else SOFTMAX
    route = Router(spec, backend="eager")
    given = {
        "num_valid_tokens=tensor": {"num_valid_tokens": torch.tensor([3])},
        "num_valid_tokens=int": {"num_valid_tokens": 3},
        "expert_map": {"expert_map": torch.randperm(E)},
        "token table": {"token_ids": torch.arange(5), "expert_table": torch.randint(E, (9, K))},
    }[extra]
    logits = torch.randn(5, E)
    first = route(logits, K, **given)
    monkeypatch.setattr(route._calls, "checked", lambda *_: pytest.fail("checked again"))
    again = route(logits, K, **given)
    assert torch.equal(first.ids, again.ids)
    assert torch.equal(first.weights, again.weights)
    if extra == "num_valid_tokens=int":
        assert (route(logits, K, num_valid_tokens=2).ids[2:] == -1).all()
        assert (route(logits, K, num_valid_tokens=2**40).ids >= 0).all()
    assert len(our_frames(lambda: route(logits, K, **given))) <= 20


def test_a_negative_number_of_valid_tokens_is_refused_after_a_right_one():
    route, logits = Router(SOFTMAX), torch.randn(5, E)
    for _ in range(2):
        route(logits, K, num_valid_tokens=3)
        with pytest.raises(ValueError, match="num_valid_tokens: expected a number >= 0, got -1"):
            route(logits, K, num_valid_tokens=-1)


def test_the_report_is_that_of_the_latest_call(add_backend):
    add_backend("noted", "build_noted")
    route, logits = Router(SOFTMAX), torch.randn(5, E)
    for _ in range(2):
        route(logits, K)
        assert route.backend == "eager"
        with moe_routing.prefer("noted"):
            route(logits, K)
        assert route.backend == "noted"
    assert route.report.rejection("torch-compile").verdict.code is RejectCode.EXPLICIT_ONLY


@pytest.mark.parametrize(
    ("notes", "said"),
    [
        (None, "its kernel's notes returned None, not a tuple of strings"),
        ("fast", "its kernel's notes returned 'fast', not a tuple of strings"),
        (SystemExit, "its kernel's notes raised SystemExit"),
    ],
)
def test_a_kernel_whose_notes_are_wrong_routes_and_the_report_says_so(
    add_backend, monkeypatch, notes, said
):
    add_backend("noted-badly", "build_noted_badly")
    route = Router(SPEC, backend="noted-badly")
    monkeypatch.setattr(NotedBadly, "NOTES", notes)
    route(torch.randn(3, E), K, torch.rand(E))
    assert said in route.report.notes


def test_a_kernel_whose_method_is_none_cannot_be_built(add_backend):
    add_backend("number", "build_number")
    with pytest.raises(BackendUnavailableError, match="warmup: expected a method, got 3"):
        Router(SPEC, backend="number")(torch.randn(3, E), K, torch.rand(E))


def test_a_kernel_whose_class_raises_cannot_be_built(add_backend):
    add_backend("classless", "build_classless")
    with pytest.raises(BackendUnavailableError, match="looking at its kernel raised KeyError"):
        Router(SPEC, backend="classless")(torch.randn(3, E), K, torch.rand(E))
