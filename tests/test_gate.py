"""``Router.gate``: what the kit does not hold a backend to."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants import Mutant, registered
from mutants.gating import PLANS, Fused, Planned, Projects
from mutants.gating._mutant import ROUTES
from mutants.gating.logits import NoNormWeight
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from transformers import Gemma4TextConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRouter

import moe_routing
from moe_routing.cli._app import run as command
from moe_routing.conformance.gating._sets import FORMS
from moe_routing.conformance.gating.cases import HIDDEN, Case
from moe_routing.gating import GateOutput, GateProblem
from moe_routing.gating.example import GATE_EXAMPLE
from moe_routing.reference import gate_oracle
from moe_routing_backends.eager import gate as eager
from moe_routing_registry import BackendUnavailableError, RejectCode

T, E, K, H = 9, 16, 4, 40
ROUTE = moe_routing.get_router("gemma4")
GATE = ROUTE.gate
PLAIN = moe_routing.get_router("mixtral").gate


def operands(dtype=torch.float32):
    """Return what Gemma 4's router takes, by name."""
    return {
        "hidden": torch.randn(T, H).to(dtype),
        "router_weight": torch.randn(E, H).to(dtype),
        "topk": K,
        "per_expert_scale": torch.rand(E),
        "norm": moe_routing.RMSNorm(eps=1e-6),
        "input_scale": torch.rand(H),
        "input_multiplier": H**-0.5,
    }


def gemma4s_router(dtype=torch.float32):
    config = Gemma4TextConfig(hidden_size=H, num_experts=E, top_k_experts=K, enable_moe_block=True)
    router = Gemma4TextRouter(config)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, 1.0, 0.3)
    return router.to(dtype)


def of_module(router):
    """Return the operands that are parameters of transformers' module."""
    return {
        "router_weight": router.proj.weight,
        "topk": K,
        "per_expert_scale": router.per_expert_scale,
        "norm": moe_routing.RMSNorm(router.eps),
        "input_scale": router.scale,
        "input_multiplier": router.scalar_root_size,
    }


def test_gemma4s_router_is_one_call():
    router = gemma4s_router()
    hidden = torch.randn(200, H)
    probabilities, theirs, ids = router(hidden)
    made = GATE(hidden, **of_module(router), return_logits=True)
    torch.testing.assert_close(made.logits.softmax(-1), probabilities, rtol=1e-4, atol=1e-6)
    assert torch.equal(made.ids.long(), ids)
    torch.testing.assert_close(made.weights, theirs, rtol=1e-4, atol=1e-6)


def test_gemma4s_router_trains_as_its_module_does():
    router = gemma4s_router()
    hidden = torch.randn(20, H)
    leaves = list(router.parameters())
    gradients = [
        torch.autograd.grad(weights.square().sum(), leaves)
        for weights in (router(hidden)[1], GATE(hidden, **of_module(router)).weights)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


@settings(max_examples=20)  # each size is a problem of its own
@given(tokens=st.integers(0, 40), experts=st.integers(1, 40), columns=st.integers(1, 70))
def test_sizes_of_every_kind_are_gated(tokens, experts, columns):
    hidden, weight = torch.randn(tokens, columns), torch.randn(experts, columns)
    gate = moe_routing.get_router("mixtral").gate
    for invariant in (True, False):
        made = gate(hidden, weight, 1, return_logits=True, invariant=invariant)
        torch.testing.assert_close(made.logits, hidden @ weight.t(), rtol=1e-4, atol=1e-4)
        assert torch.equal(made.ids.long(), made.logits.argmax(1, keepdim=True))


def test_what_comes_back_has_names():
    given = operands()
    assert isinstance(GATE(**given), moe_routing.RoutingOutput)
    made = GATE(**given, return_logits=True)
    assert isinstance(made, GateOutput)
    assert made.logits.dtype is torch.float32


def test_a_plan_is_that_of_the_ids():
    given = operands()
    weights, ids, plan = GATE.with_plan(**given, block=8)
    assert torch.equal(ids, GATE(**given).ids)
    expected = moe_routing.plan(ids, E, block=8)
    assert all(map(torch.equal, plan[:5], expected[:5]))
    weights, ids, plan = GATE.with_plan(**given, capacity=1, drop="least_weight")
    expected = moe_routing.plan(ids, E, capacity=1, drop="least_weight", weights=weights)
    assert torch.equal(plan.order, expected.order)


def test_a_plan_knows_physical_experts():
    given = {**operands(), "expert_map": torch.arange(E).flip(0) + 3}
    with pytest.raises(TypeError, match=r"^num_experts: "):
        GATE.with_plan(**given)
    assert GATE.with_plan(**given, num_experts=E + 3).plan.counts[:3].tolist() == [0, 0, 0]
    with pytest.raises(TypeError, match=r"^return_logits: "):
        GATE.with_plan(**given, num_experts=E + 3, return_logits=True)


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: Case(**form).id)
def test_both_ways_of_eagers_one_order_have_the_same_bits(form, hidden, monkeypatch):
    case = Case(**{**form, "hidden": hidden, "num_tokens": 65})
    projection = case.make(torch.device("cpu")).projection
    made = [torch.full((65, 64), torch.nan) for _ in range(2)]
    eager.in_one_order(projection, made[0])

    def by_terms(inputs, weight, bias, logits):
        logits.copy_(eager._rounded(eager.pairwise(inputs[:, None] * weight), bias))

    monkeypatch.setattr(eager, "_by_product", by_terms)
    eager.in_one_order(projection, made[1])
    assert torch.equal(*made)


def test_few_sums_are_added_term_by_term(monkeypatch):
    added = []
    monkeypatch.setattr(
        eager, "pairwise", lambda terms, right=eager.pairwise: added.append(terms) or right(terms)
    )
    hidden, weight = torch.randn(500, 300), torch.randn(64, 300)
    moe_routing.get_router("mixtral", backend="eager").gate(hidden, weight, 2)
    assert sum(map(len, added)) < 500 * 64 / 100


def test_shorter_products_of_pytorch_reach_no_logit():
    case = Case(dtype="float32", columns=2816, invariant=False)
    projection = case.make(torch.device("cpu")).projection
    home = getattr(torch.backends.mkldnn, "matmul", None)
    if home is None:
        torch.set_float32_matmul_precision("medium")
    else:
        home.fp32_precision = "bf16"
    try:
        assert not eager._float32_is_exact()
        made = torch.empty(33, 64)
        eager.in_float32(projection, made)
    finally:
        if home is None:
            torch.set_float32_matmul_precision("highest")
        else:
            home.fp32_precision = "none"
    assert eager._float32_is_exact()
    assert torch.equal(made, gate_oracle.logits(projection).float())


def test_a_fused_kernel_serves_plain_traced_and_training_calls():
    given = operands()
    right = moe_routing.get_router("gemma4", backend="eager").gate(**given, return_logits=True)
    with registered(Mutant(Fused, "", operation="gate")) as name:
        router = moe_routing.get_router("gemma4", backend=name, verify=True)
        Fused.asked.clear()
        made = router.gate(**given)
        assert Fused.asked == [True]  # logits, which shadow mode compares
        assert torch.equal(made.ids, right.ids)
        assert router.health().compared == 1
        assert router.health().ok
        router = moe_routing.get_router("gemma4", backend=name)
        Fused.asked.clear()
        router.gate(**given)
        router.gate(**given, return_logits=True)
        assert Fused.asked == [False, True]
        hidden = given["hidden"].clone().requires_grad_()
        weights, _ = router.gate(**{**given, "hidden": hidden})
        weights.square().sum().backward()
        assert hidden.grad.abs().sum() > 0
        torch.compiler.reset()
        compiled = torch.compile(router.gate, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(**given).ids, right.ids)
        assert len(Fused.asked) == 4


def test_shadow_mode_compares_what_is_gated():
    router = moe_routing.get_router("gemma4", verify=True)
    router.gate(**operands())
    assert router.health().compared == 1
    assert router.health().ok


@pytest.mark.parametrize("traced", [False, True], ids=["plain", "traced"])
def test_shadow_mode_sees_wrong_logits_that_are_routed_right(traced):
    given = {**operands(), "norm": moe_routing.RMSNorm(1e-6, torch.rand(H) + 1)}
    with registered(Mutant(NoNormWeight, "", operation="gate", others=ROUTES)) as name:
        router = moe_routing.Router(ROUTE.spec, backend=name, verify=True)
        torch.compiler.reset()
        gate = router.gate
        (torch.compile(gate, fullgraph=True, backend="aot_eager") if traced else gate)(**given)
        health = router.health()
    assert (health.compared, health.wrong, health.failures) == (1, 1, 0)
    assert re.match(r"row \d+: the logit of expert \d+ is ", health.latest)


def test_threads_gate_at_once():
    given = operands()
    right, made = GATE(**given), {}

    def work(thread):
        made[thread] = GATE(**given)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 8
    assert all(torch.equal(one.weights, right.weights) for one in made.values())


FLOAT_OPERANDS = ("hidden", "router_weight", "router_bias", "input_scale", "per_expert_scale")


def gated(gate=GATE, **given):
    """Return what a call makes, and the names of the Python functions that it enters."""
    entered = []
    sys.setprofile(
        lambda frame, event, _: entered.append(frame.f_code.co_name) if event == "call" else None
    )
    try:
        return gate(**given), entered
    finally:
        sys.setprofile(None)


BOTH = pytest.mark.parametrize("gate", [GATE, GATE.with_plan], ids=["call", "with_plan"])


@BOTH
def test_a_call_like_the_one_before_is_not_checked_again(gate):
    given = operands()
    gate(**given)
    logits = {"return_logits": True} if gate is GATE else {}
    for change in ({}, {"hidden": torch.randn(T, H)}, {"router_weight": torch.randn(E, H)}, logits):
        assert "_checked" not in gated(gate, **{**given, **change})[1]
    weight = torch.nn.Parameter(given["router_weight"])
    with torch.no_grad():
        gate(**{**given, "router_weight": weight})
        assert "_checked" not in gated(gate, **{**given, "router_weight": weight})[1]


def test_plans_of_other_kinds_are_checked_and_remembered_by_themselves():
    given = operands()
    ids = GATE(**given).ids
    kinds = ({}, {"block": 4}, {"capacity": 2}, {"capacity": 2, "masked": True}, {"num_experts": 9})
    for kind in kinds:
        assert "_checked" in gated(GATE.with_plan, **given, **kind)[1]
    for kind in kinds:
        made, entered = gated(GATE.with_plan, **given, **kind)
        assert "_checked" not in entered
        right = moe_routing.plan(ids, **{"num_experts": E, **kind})
        assert flat(made.plan) == flat(right)
    for wrong in ({"block": 4.0}, {"block": True}, {"num_experts": 9.0}, {"masked": 1}):
        with pytest.raises((TypeError, ValueError), match=rf"^{next(iter(wrong))}: "):
            GATE.with_plan(**given, **wrong)


def flat(plan):
    return [None if part is None else part.tolist() for part in plan]


def test_a_call_and_a_plan_remember_the_same_operands():
    given = operands()
    GATE.with_plan(**given)
    assert "_checked" not in gated(GATE, **given)[1]
    assert "_checked" not in gated(GATE.with_plan, **given)[1]


class LeavesThePlan(Planned):
    def planned(self, *_, **__):
        return None


@pytest.mark.parametrize("kernel", [Planned, LeavesThePlan])
def test_a_kernel_may_plan_what_it_gates_or_leave_it(kernel):
    given = operands()
    right = GATE.with_plan(**given)
    with registered(Mutant(kernel, "", operation="gate", others=PLANS)) as name:
        gate = moe_routing.get_router("gemma4", backend=name).gate
        for _ in range(3):
            kernel.asked.clear()
            made = gate.with_plan(**given)
            assert kernel.asked == [False]
            assert torch.equal(made.ids, right.ids)
            assert flat(made.plan) == flat(right.plan)


@BOTH
def test_a_call_unlike_the_one_before_is_checked(gate):
    given = operands()
    weight = torch.nn.Parameter(given["router_weight"])
    unlike = (
        {"hidden": given["hidden"].half().float().t().contiguous().t()},
        {"hidden": given["hidden"][:3]},
        {"router_weight": weight},
        {"topk": K + 1},
        {"router_bias": torch.rand(E)},
        {"norm": None},
        {"norm": moe_routing.RMSNorm(1e-5)},
        {"norm": moe_routing.RMSNorm(1e-6, torch.rand(H))},
        {"input_scale": None},
        {"input_scale": given["input_scale"].half()},
        {"input_multiplier": 0.5},
        {"logits_dtype": torch.bfloat16},
        {"invariant": False},
        {"num_valid_tokens": 3},
        {"num_valid_tokens": torch.tensor(3)},
        {"expert_map": torch.arange(E).flip(0)},
        {"ids_dtype": torch.int64},
    )
    for change in unlike:
        changed = {**given, **change}
        right = moe_routing.Router(ROUTE.spec).gate(**changed)
        plans = gate is not GATE
        gate(**given)
        made, entered = gated(gate, **changed, **({"num_experts": E} if plans else {}))
        assert "_checked" in entered
        assert all(map(torch.equal, made[:2], right))
        assert not plans or flat(made.plan) == flat(moe_routing.plan(right.ids, E))
    with torch.no_grad():
        assert not gate(**{**given, "router_weight": weight}).weights.requires_grad
    assert gate(**{**given, "router_weight": weight}).weights.requires_grad


@BOTH
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_a_call_before_it_made_right_is_still_wrong(gate):
    given = {**operands(), "router_bias": torch.rand(E)}
    # The guard of known calls would end the process if it saw one.
    nested = torch.nested.nested_tensor([torch.rand(E)], layout=torch.strided)
    for change, argument in (
        ({"norm": 1e-6}, "norm"),
        ({"norm": (1e-6, None)}, "norm"),
        ({"norm": moe_routing.RMSNorm(eps=True)}, "norm"),
        ({"input_multiplier": torch.tensor(H**-0.5)}, "input_multiplier"),
        ({"num_valid_tokens": True}, "num_valid_tokens"),
        ({"num_valid_tokens": -1}, "num_valid_tokens"),
        ({"num_valid_tokens": np.int64(-1)}, "num_valid_tokens"),
        ({"hidden": given["hidden"].tolist()}, "hidden"),
        ({"router_bias": nested}, "router_bias"),
        ({"per_expert_scale": nested}, "per_expert_scale"),
        ({"per_expert_scale": None}, "per_expert_scale"),
        ({"return_logits": 1}, "return_logits"),
        ({"invariant": 1}, "invariant"),
    ):
        gate(**given)
        gate(**{**given, "num_valid_tokens": 1})
        gate(**{**given, "num_valid_tokens": np.int64(1)})
        with pytest.raises((TypeError, ValueError), match=rf"^{argument}: "):
            gate(**{**given, **change})


def test_a_backend_that_is_registered_later_is_found():
    given = operands()
    gate = moe_routing.get_router(ROUTE.spec).gate
    gate(**given)
    with registered(Mutant(Fused, "", operation="gate")) as name, moe_routing.prefer(name):
        Fused.asked.clear()
        gate(**given)
        assert Fused.asked == [False]
    gate(**given)
    assert Fused.asked == [False]


def test_fake_tensors_after_a_plain_call_are_fake():
    given = {**operands(), "norm": None}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = {k: mode.from_tensor(v) if torch.is_tensor(v) else v for k, v in given.items()}
    GATE(**given)
    assert type(GATE(**fakes).ids) is FakeTensor
    GATE(**given)
    with mode:
        assert type(GATE(**given).ids) is FakeTensor
    assert type(GATE(**given).ids) is torch.Tensor


@pytest.mark.parametrize("name", FLOAT_OPERANDS)
def test_tensors_inside_torch_func_are_refused_by_name(name):
    given = {**operands(), "router_bias": torch.rand(E)}

    def of(tensor):
        return GATE(**{**given, name: tensor}).weights.sum()

    refused = rf"^{name}: expected a tensor outside torch\.func and forward mode; route the logits"
    with pytest.raises(TypeError, match=refused):
        torch.func.grad(of)(given[name])
    with pytest.raises(TypeError, match=refused):
        torch.vmap(of)(given[name][None])


@pytest.mark.parametrize("name", FLOAT_OPERANDS)
def test_a_tangent_is_refused_and_not_dropped(name):
    given = {**operands(), "router_bias": torch.rand(E)}
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(given[name], torch.ones_like(given[name]))
        with pytest.raises(
            TypeError, match=rf"^{name}: expected a tensor outside torch\.func and f"
        ):
            GATE(**{**given, name: dual})
        assert GATE(**given).ids.shape == (T, K)


def test_a_parameter_without_a_shape_is_refused_by_name():
    given = operands()
    for name in FLOAT_OPERANDS:
        nothing = torch.nn.UninitializedParameter()
        with pytest.raises(ValueError, match=rf"^{name}: expected a dense tensor"):
            GATE(**{**given, name: nothing})
    with pytest.raises(ValueError, match=r"^logits: expected a dense tensor"):
        ROUTE(torch.nn.UninitializedParameter(), K, given["per_expert_scale"])


@pytest.mark.parametrize("value", [10**400, 1e-45, -1e-45, Fraction(10**400)])
def test_a_number_that_float32_does_not_hold_is_refused_by_name(value):
    given = operands()
    with pytest.raises(ValueError, match=r"^input_multiplier: expected a number from magnitude"):
        GATE(**{**given, "input_multiplier": value})
    with pytest.raises(ValueError, match=r"^norm: eps: expected a number from 1\.17549e-38 to"):
        GATE(**{**given, "norm": moe_routing.RMSNorm(value)})


@pytest.mark.parametrize("invariant", [True, False])
def test_autocast_changes_neither_logits_nor_gradients(invariant):
    given = {**operands(), "invariant": invariant, "return_logits": True}
    leaves = [given[name].requires_grad_() for name in FLOAT_OPERANDS if name in given]
    made = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = GATE(**given)
            loss = out.weights.square().sum() + out.logits.square().sum()
            made.append((*out, *torch.autograd.grad(loss, leaves)))
    assert len(made[0]) == 7
    assert all(map(torch.equal, *made))


def test_zeros_have_one_sign_in_any_batch():
    weight = torch.tensor([[0.0], [-0.0], [1.0]])
    hidden = torch.tensor([[-1.0], [1.0], [-0.0], [0.0], [-1.0]])
    whole = PLAIN(hidden, weight, 1, return_logits=True).logits
    for row in range(len(hidden)):
        alone = PLAIN(hidden[row : row + 1], weight, 1, return_logits=True).logits
        assert torch.equal(alone.view(torch.int32), whole[row : row + 1].view(torch.int32))
    assert not whole[:, :2].signbit().any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, -torch.nan])
def test_rows_that_are_not_finite_are_not_added_term_by_term(monkeypatch, value):
    added = []
    monkeypatch.setattr(
        eager, "pairwise", lambda terms, right=eager.pairwise: added.append(terms) or right(terms)
    )
    hidden, weight = torch.randn(200, 300), torch.randn(64, 300)
    hidden[3:] = value
    gate = moe_routing.get_router("mixtral", backend="eager").gate
    made = gate(hidden, weight, 2, return_logits=True).logits
    assert sum(map(len, added)) < 64
    assert not made[3:].isfinite().any()
    alone = gate(hidden[7:8], weight, 2, return_logits=True).logits
    assert torch.equal(alone.view(torch.int32), made[7:8].view(torch.int32))


def test_many_rows_are_gated_some_at_a_time(monkeypatch):
    hidden, weight = torch.randn(50, 300), torch.randn(64, 300)
    gate = moe_routing.get_router("mixtral", backend="eager").gate
    right = gate(hidden, weight, 2, return_logits=True).logits
    seen = []
    monkeypatch.setattr(
        eager,
        "_by_product",
        lambda inputs, *others, right=eager._by_product: (
            seen.append(len(inputs)) or right(inputs, *others)
        ),
    )
    monkeypatch.setattr(eager, "TERMS_AT_A_TIME", 300 * 20)
    assert torch.equal(gate(hidden, weight, 2, return_logits=True).logits, right)
    assert seen == [20, 20, 10]


def test_a_tensor_that_is_negated_lazily_is_read_as_it_is():
    given = operands()
    negated = torch.randn(T, H, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    made = GATE(**{**given, "hidden": negated}, return_logits=True)
    right = GATE(**{**given, "hidden": negated.resolve_neg().clone()}, return_logits=True)
    assert torch.equal(made.logits, right.logits)


def test_a_configuration_says_how_many_experts_there_are():
    config = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    gate = moe_routing.get_router(config).gate
    assert gate(torch.randn(3, H), torch.randn(8, H)).ids.shape == (3, 2)
    with pytest.raises(ValueError, match=r"^router_weight: expected num_experts = 8 rows"):
        gate(torch.randn(3, H), torch.randn(9, H))


def test_a_backend_without_one_order_declines_and_says_what_to_do():
    gate = moe_routing.get_router("gemma4", backend="torch-compile").gate
    with pytest.raises(BackendUnavailableError) as raised:
        gate(**operands())
    verdict = raised.value.report.rejection("torch-compile").verdict
    assert verdict.code is RejectCode.INVARIANCE
    assert verdict.fix == "pass invariant=False"


@pytest.mark.slow  # it compiles
def test_the_compiled_formula_gates_in_any_order():
    given = {**operands(), "invariant": False, "return_logits": True}
    made = moe_routing.get_router("gemma4", backend="torch-compile").gate(**given)
    right = GATE(**given)
    torch.testing.assert_close(made.logits, right.logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(made.ids, right.ids)


def test_a_backend_that_only_writes_logits_leaves_routing_to_the_best():
    given = operands()
    with registered(Mutant(Projects, "", operation="gate")) as name:
        made = moe_routing.get_router("gemma4", backend=name).gate(**given, return_logits=True)
    right = GATE(**given, return_logits=True)
    assert all(map(torch.equal, made, right))


def test_explain_says_which_order_is_in_use(capsys):
    report = moe_routing.explain(GATE_EXAMPLE)
    assert report.winner == "eager"
    assert "one order" in report.notes[0]
    assert "composed of two operations" in report.notes[1]
    assert command(["explain", "gate", "-e", "64", "-k", "6", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["operation"], said["winner"]) == ("gate", "eager")
    assert said["problem"]["num_experts"] == 64
    assert said["problem"]["invariant"] is True


def test_problems_take_only_what_gate_takes():
    words = {"spec": ROUTE.spec, "num_experts": 8, "topk": 2, "hidden_size": 64, "dtype": "float32"}
    assert str(GateProblem(**words)) == "gate gemma4 E=8 K=2 H=64 float32"
    for name, value in (
        ("num_experts", 1025), ("hidden_size", 16385), ("hidden_size", 0), ("dtype", "float64"),
        ("logits_dtype", "int8"), ("topk", 9),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"^{name}: "):
            GateProblem(**{**words, name: value})


LOADS = """
import sys, torch, moe_routing
hidden, expected = torch.load(sys.argv[2])
made = torch.export.load(sys.argv[1]).module()(hidden)
assert type(made).__name__ == "GateOutput"
assert all(map(torch.equal, made, expected))
"""


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.router = gemma4s_router().requires_grad_(requires_grad=False)

    def forward(self, hidden):
        return GATE(hidden, **of_module(self.router), return_logits=True)


@pytest.mark.slow  # a new process
def test_a_layer_is_exported_saved_and_loaded_in_a_new_process(tmp_path):
    layer, hidden = Layer(), torch.randn(5, H)
    dynamic = ({0: torch.export.Dim("tokens")},)
    program = torch.export.export(layer, (hidden,), dynamic_shapes=dynamic)
    torch.export.save(program, tmp_path / "layer.pt2")
    other = torch.randn(3, H)
    torch.save((other, tuple(layer(other))), tmp_path / "expected.pt")
    files = [str(tmp_path / "layer.pt2"), str(tmp_path / "expected.pt")]
    subprocess.run([sys.executable, "-c", LOADS, *files], check=True)


def test_a_wrong_plan_is_refused_before_anything_is_gated():
    with registered(Mutant(Fused, "", operation="gate")) as name:
        gate = moe_routing.get_router("gemma4", backend=name).gate
        Fused.asked.clear()
        for options, error in (({"block": 0}, ValueError), ({"nonsense": 1}, TypeError)):
            with pytest.raises(error, match=rf"^{next(iter(options))}: "):
                gate.with_plan(**operands(), **options)
        with pytest.raises(BackendUnavailableError, match="for plan "):  # the backend has none
            gate.with_plan(**operands())
    assert Fused.asked == []


def test_a_plan_is_made_of_any_number_of_tokens_with_gradients_too():
    given = operands()
    for tokens, capacity in ((0, 1), (1, 1), (T, 2)):
        hidden = torch.randn(tokens, H, requires_grad=True)
        weights, ids, plan = GATE.with_plan(
            **{**given, "hidden": hidden}, capacity=capacity, drop="least_weight"
        )
        expected = moe_routing.plan(
            ids, E, capacity=capacity, drop="least_weight", weights=weights.detach()
        )
        assert all(map(torch.equal, plan[:4], expected[:4]))
        weights.sum().backward()
        assert hidden.grad.shape == (tokens, H)


def test_a_plan_is_compiled_with_its_gate():
    given = operands()
    torch.compiler.reset()
    compiled = torch.compile(GATE.with_plan, fullgraph=True, backend="aot_eager")
    made, right = compiled(**given, block=4), GATE.with_plan(**given, block=4)
    assert torch.equal(made.weights, right.weights)
    assert torch.equal(made.plan.order, right.plan.order)
