"""Shadow mode sees what is wrong on live calls, and is never in the way."""

import gc
import logging
import random
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from mutants import MUTANTS, registered

from moe_routing import Operands, Router, RoutingOutput, get_router
from moe_routing.conformance.cases import Case
from moe_routing.conformance.variants import VARIANTS
from moe_routing.reference import shadow

LOGITS = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
SPEC = VARIANTS["topk_softmax"]


@pytest.fixture(autouse=True)
def _seeded_sampling(monkeypatch):
    """Let the sampling of calls and rows start from the run's seed.

    The product seeds its own from the operating system.
    """
    seed = random.getrandbits(32)
    monkeypatch.setattr(shadow, "random", SimpleNamespace(Random=lambda: random.Random(seed)))  # noqa: S311 -- sampling


@pytest.fixture
def wrong_backend():
    with registered(
        next(m for m in MUTANTS if m.name == "mutant-weights-rounded-to-bfloat16")
    ) as name:
        yield name


def test_a_right_backend_is_healthy():
    route = Router(SPEC, backend="eager", verify=True)
    for _ in range(3):
        route(LOGITS, 2)
    health = route.health()
    assert health == shadow.Health(rate=1.0, calls=3, compared=3, rows=15)
    assert health.ok


def test_a_wrong_backend_is_told_and_its_result_left_alone(wrong_backend, caplog):
    watched, plain = (
        Router(SPEC, backend=wrong_backend, verify=True),
        Router(SPEC, backend=wrong_backend),
    )
    with caplog.at_level(logging.WARNING, "moe_routing.verify"):
        result = watched(LOGITS, 2)
    assert torch.equal(result.weights, plain(LOGITS, 2).weights)
    assert watched.health().wrong == 1
    assert not watched.health().ok
    assert "weight of id" in watched.health().latest
    assert "topk_softmax" in caplog.text
    assert "weight of id" in caplog.text


def test_without_shadow_mode_nothing_is_seen():
    route = Router(SPEC, backend="eager")
    route(LOGITS, 2)
    assert route.health() == shadow.Health()


def test_the_environment_turns_it_on(monkeypatch):
    monkeypatch.setenv("MOE_ROUTING_VERIFY", "sample:0.5")
    route = Router(SPEC, backend="eager")
    for _ in range(64):
        route(LOGITS, 2)
    health = route.health()
    assert health.calls == 64
    assert 0 < health.compared < 64


def test_the_argument_counts_more_than_the_environment(monkeypatch):
    monkeypatch.setenv("MOE_ROUTING_VERIFY", "1")
    route = Router(SPEC, backend="eager", verify=False)
    route(LOGITS, 2)
    assert route.health().calls == 0


@pytest.mark.parametrize("value", ["often", "sample:", "sample:2", "-1"])
def test_a_value_that_is_no_share_is_named(monkeypatch, value):
    monkeypatch.setenv("MOE_ROUTING_VERIFY", value)
    with pytest.raises(ValueError, match="MOE_ROUTING_VERIFY: expected sample:SHARE"):
        Router(SPEC)


def test_an_argument_that_is_no_share_is_named():
    with pytest.raises(ValueError, match="verify: expected True, False or a share"):
        Router(SPEC, verify=1.5)


def test_calls_that_want_gradients_are_watched():
    route = Router(SPEC, backend="eager", verify=True)
    logits = LOGITS.clone().requires_grad_()
    route(logits, 2).weights[:, 0].sum().backward()
    assert logits.grad.abs().sum() > 0
    assert (route.health().compared, route.health().ok) == (1, True)


@pytest.mark.parametrize("training", [False, True])
def test_calls_inside_a_compiled_function_are_watched(wrong_backend, training):
    for backend, wrong in (("eager", 0), (wrong_backend, 2)):
        route = Router(SPEC, backend=backend, verify=True)
        compiled = torch.compile(
            lambda logits, route=route: route(logits, 2), fullgraph=True, backend="aot_eager"
        )
        for _ in range(2):
            compiled(LOGITS.clone().requires_grad_(training))
        health = route.health()
        assert (health.calls, health.compared, health.wrong, health.failures) == (2, 2, wrong, 0)


def test_a_router_that_a_compiled_function_makes_is_watched_and_the_logger_tells(
    wrong_backend, caplog
):
    def inside(logits):
        return get_router(SPEC, backend=wrong_backend, verify=True)(logits, 2)

    with caplog.at_level(logging.WARNING, "moe_routing.verify"):
        torch.compile(inside, fullgraph=True, backend="eager")(LOGITS)
    assert "weight of id" in caplog.text


def test_a_program_that_outlives_its_router_says_once_that_nothing_watches_it(caplog):
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.route = Router(SPEC, backend="eager", verify=True)

        def forward(self, logits):
            return tuple(self.route(logits, 2))

    module = Module()
    program = torch.export.export(module, (LOGITS,)).module()
    with caplog.at_level(logging.WARNING, "moe_routing.verify"):
        program(LOGITS)
        assert module.route.health().compared == 1
        del module
        gc.collect()
        for _ in range(2):
            program(LOGITS)
    assert caplog.text.count("its calls are not compared") == 1


def test_a_comparison_that_fails_does_not_reach_the_caller(monkeypatch, caplog):
    def broken(*_arguments, **_operands):
        msg = "the kit is broken"
        raise RuntimeError(msg)

    monkeypatch.setattr(shadow, "compare", broken)
    route = Router(SPEC, backend="eager", verify=True)
    with caplog.at_level(logging.ERROR, "moe_routing.verify"):
        assert route(LOGITS, 2).ids.shape == (5, 2)
    assert route.health().failures == 1
    assert not route.health().ok
    assert "the kit is broken" in caplog.text


def test_near_ties_are_counted_and_are_not_wrong():
    spec = VARIANTS["sigmoid_bias_topk"]
    logits, bias = torch.tensor([[30.0, 31.0, 0.0]]), torch.zeros(3)
    watching = shadow.Shadow(1.0)
    in_float32 = RoutingOutput(
        torch.tensor([[0.5, 0.5]]), torch.tensor([[0, 1]])
    )  # both sigmoids are 1 there
    watching.observe(spec, 2, Operands(logits, bias=bias), in_float32, lambda _: in_float32)
    assert (watching.health().near_ties, watching.health().wrong) == (1, 0)


@pytest.mark.parametrize("variant", ["hash_sqrtsoftplus", "gemma4/shared", "grouped_sigmoid_bias"])
def test_a_stretch_of_a_long_call_is_compared_with_all_its_operands(variant, monkeypatch):
    monkeypatch.setattr(shadow, "ROWS", 16)
    call = Case(variant=variant, num_tokens=100, valid="tensor", mapped=True).make()
    route = Router(call.spec, backend="eager", verify=True)
    for _ in range(20):
        route(call.logits, call.topk, **call.operands)
    assert route.health() == shadow.Health(rate=1.0, calls=20, compared=20, rows=320)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.float64])
def test_a_scale_of_any_dtype_is_watched(dtype):
    route = Router(VARIANTS["gemma4"], backend="eager", verify=True)
    route(LOGITS, 2, torch.linspace(0.5, 4, 16).to(dtype))
    assert (route.health().compared, route.health().ok) == (1, True)


MAPS = {"elsewhere": [-1, 0] * 8, "shared": [7, 7, 2**31 - 1, 0] * 4, "all elsewhere": [-1] * 16}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("expert_map", MAPS.values(), ids=MAPS)
def test_a_map_of_experts_that_share_an_id_or_are_elsewhere_is_watched(expert_map, compiled):
    for mutant, wrong in (
        (None, 0),
        ("mutant-elsewhere-has-no-weight", 1 if -1 in expert_map else 0),
    ):
        with (
            registered(next(m for m in MUTANTS if m.name == mutant))
            if mutant
            else nullcontext("eager") as name
        ):
            route = Router(SPEC, backend=name, verify=True)

            def call(logits, expert_map, route=route):
                return route(logits, 2, expert_map=expert_map)

            call = torch.compile(call, fullgraph=True, backend="eager") if compiled else call
            call(LOGITS, torch.tensor(expert_map))
            health = route.health()
            assert (health.compared, health.wrong, health.failures) == (1, wrong, 0)
            assert ("without expert_map" in health.latest) == bool(wrong)


def test_the_callers_random_numbers_stay_as_they_are():
    route = Router(SPEC, backend="eager", verify=0.5)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    route(LOGITS, 2)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.slow
def test_without_shadow_mode_the_kit_is_not_imported():
    code = (
        "import sys, torch, moe_routing; moe_routing.get_router('mixtral')(torch.zeros(1, 4), 2);"
        "print([name for name in sys.modules if name.startswith('moe_routing.conformance')])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
