"""Recorded ids: what users of routers see. The kit has the maths (clause 16)."""

import pytest
import torch

import moe_routing
from moe_routing import RoutingOutput
from moe_routing._registry import registry
from moe_routing.reference import oracle
from moe_routing.reference.compare import compare
from moe_routing_registry import (
    ANY,
    BackendSpec,
    BackendUnavailableError,
    RejectCode,
    RoutingSpec,
    Target,
)

E, K, T = 16, 4, 12
DEEPSEEK = RoutingSpec(
    family="grouped_sigmoid_bias",
    score="sigmoid",
    selection="scores_plus_bias",
    renormalize=True,
    num_groups=4,
    topk_groups=2,
    scale=2.5,
)
RECORD = torch.tensor([[-1] * K, [3, -1, 7, 0], [3, 5, -1, -1], [1, 1, 1, 1], [2, 4, E, 6]])


def drawn(rows=T):
    return torch.randn(rows, E)


def record(rows=T):
    return torch.cat([RECORD, torch.rand(rows - len(RECORD), E).argsort(-1)[:, :K]])


def old_kernel(problem, device):
    """Build a kernel that was written before there were recorded ids: it knows no such keyword."""
    route = moe_routing.get_router(problem.spec, backend="eager")
    del device

    def call(logits, *, per_expert_scale=None, out=None, bias=None, **others):
        assert set(others) == {"token_ids", "expert_table", "num_valid_tokens", "expert_map"}
        return route(logits, problem.topk, per_expert_scale, bias=bias, out=out)

    return call


@pytest.fixture
def old():
    spec = BackendSpec(
        name="old",
        factories={"route": f"{__name__}:old_kernel"},
        targets=(Target(ANY),),
        priority=500,
    )
    registry().register(spec)
    yield spec.name
    registry().unregister(spec.name)


def test_calls_with_and_without_a_record_take_turns():
    route, logits = moe_routing.get_router("mixtral"), drawn()
    plain, recorded = route(logits, K), record()
    for shift in range(3):
        changed = recorded.where(recorded < 0, (recorded + shift) % E)
        replayed = route(logits, K, ids=changed)
        assert compare(route.spec, logits, K, replayed, ids=changed).problems == []
        assert torch.equal(route(logits, K).ids, plain.ids)


def test_the_cache_knows_a_record_from_none_and_reads_it_at_each_call():
    route, logits = moe_routing.get_router("mixtral"), drawn()
    recorded = record()
    route(logits, K, ids=recorded)
    cached = route._calls.latest
    recorded[-1] = torch.arange(K)
    assert route(logits, K, ids=recorded).ids[-1].tolist() == list(range(K))
    assert route._calls.latest is cached
    route(logits, K)
    assert route._calls.latest is not cached


def test_an_output_may_not_lie_in_the_record():
    weights, ids = torch.empty(T, K), record().int()
    with pytest.raises(ValueError, match=r"^out: .*ids and ids that overlap"):
        moe_routing.get_router("mixtral")(drawn(), K, ids=ids, out=(weights, ids))


def test_a_backend_that_does_not_name_the_operand_is_passed_over_and_explain_says_so(old):
    route = moe_routing.Router(moe_routing.list_routers()["mixtral"])
    route(drawn(), K)
    assert route.backend == old
    route(drawn(), K, ids=record())
    assert route.backend == "eager"
    for report in (route.report, moe_routing.explain("mixtral", operands=("ids",))):
        verdict = report.rejection(old).verdict
        assert (verdict.code, verdict.reason) == (RejectCode.OPERANDS, "takes no operand ids")
        assert "with ids" in str(report.problem)
        assert report.to_dict()["problem"]["operands"] == ["ids"]


def test_a_backend_that_is_named_and_takes_no_record_refuses_it(old):
    with pytest.raises(BackendUnavailableError, match="takes no operand ids"):
        moe_routing.get_router("mixtral", backend=old)(drawn(), K, ids=record())


@pytest.mark.parametrize(
    ("operands", "error"),
    [("ids", TypeError), (3, TypeError), (frozenset({"id"}), ValueError), (("ids",), TypeError)],
)
def test_a_spec_names_operands_that_there_are(operands, error):
    with pytest.raises(error, match=r"^operands: expected"):
        BackendSpec(name="x", factories={"route": "a:b"}, targets=(Target(ANY),), operands=operands)


@pytest.mark.parametrize("operands", ["ids", 3, ("id",)])
def test_explain_says_what_is_wrong_with_operands(operands):
    assert "operands: expected" in moe_routing.explain("mixtral", operands=operands).error


def test_a_warmed_up_router_replays():
    route = moe_routing.get_router("mixtral")
    report = route.warmup(E, K, dtype=torch.float32, training=True, operands=frozenset({"ids"}))
    assert "with ids" in str(report.problem)


def test_a_plan_leaves_slots_without_an_expert_out():
    route, logits, recorded = moe_routing.get_router("mixtral"), drawn(), record()
    for _ in range(2):
        made = route.with_plan(logits, K, ids=recorded)
        expected = route(logits, K, ids=recorded)
        assert torch.equal(made.ids, expected.ids)
        assert torch.equal(made.weights, expected.weights)
        present = expected.ids[expected.ids >= 0].long()
        counts = made.plan.offsets.diff()
        assert counts.tolist() == torch.bincount(present, minlength=E).tolist()


def test_shadow_mode_compares_what_is_recorded():
    route = moe_routing.Router(moe_routing.list_routers()["mixtral"], verify=True)
    route(drawn(), K, ids=record())
    assert (route.health().compared, route.health().ok) == (1, True)


def test_a_wrong_record_is_found_by_comparing():
    logits, recorded = drawn(), record()
    right = oracle.route(RoutingSpec(family="f"), logits, K, ids=recorded)
    wrong = RoutingOutput(right.weights.float(), right.ids.roll(1, 1).int())
    found = compare(RoutingSpec(family="f"), logits, K, wrong, ids=recorded)
    assert any("are not the recorded" in problem for problem in found.problems)


def exact(spec, recorded, **operands):
    """Return the float64 weights as a function of the logits."""
    return lambda logits: oracle.route(spec, logits, K, ids=recorded, **operands).weights


@pytest.mark.parametrize("spec", [DEEPSEEK, RoutingSpec(family="softmax_topk", score="softmax")])
@pytest.mark.parametrize("training", ["plain", "compiled"])
def test_second_derivatives_are_those_of_the_oracle(spec, training):
    recorded, bias = record(), torch.randn(E) if spec.needs_bias else None
    route = moe_routing.get_router(spec)

    def ours(logits):
        return route(logits, K, bias=bias, ids=recorded).weights

    if training == "compiled":
        ours = torch.compile(ours, backend="aot_eager", fullgraph=True)
    logits, direction, second = drawn(), torch.randn(T, K), torch.randn(T, E)

    def twice(weigh, dtype):
        x = logits.to(dtype).requires_grad_()
        (first,) = torch.autograd.grad(weigh(x), x, direction.to(dtype), create_graph=True)
        return torch.autograd.grad(first, x, second.to(dtype))[0]

    if training == "compiled":  # AOTAutograd differentiates once
        x = logits.clone().requires_grad_()
        y = logits.double().requires_grad_()
        got = torch.autograd.grad(ours(x), x, direction)[0]
        wanted = torch.autograd.grad(exact(spec, recorded, bias=bias)(y), y, direction.double())[0]
    else:
        got = twice(ours, torch.float32)
        wanted = twice(exact(spec, recorded, bias=bias), torch.float64)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)


def test_functional_transforms_go_through_a_record():
    route, recorded, direction = moe_routing.get_router(DEEPSEEK), record(), torch.randn(T, E)
    bias, logits = torch.randn(E), drawn()

    def ours(x, ids=recorded):
        return route(x, K, bias=bias, ids=ids).weights

    weights, tangent = torch.func.jvp(ours, (logits,), (direction,))
    expected, exactly = torch.func.jvp(
        exact(DEEPSEEK, recorded, bias=bias), (logits.double(),), (direction.double(),)
    )
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tangent.double(), exactly, rtol=1e-4, atol=1e-5)
    several, records = torch.randn(3, T, E), torch.stack([record() for _ in range(3)])
    batched = torch.func.vmap(ours)(several, records)
    one_by_one = torch.stack([ours(x, i) for x, i in zip(several, records, strict=True)])
    assert torch.equal(batched, one_by_one)


def test_gate_takes_a_record():
    route, recorded = moe_routing.get_router("mixtral"), record()
    hidden, weight = torch.randn(T, 8, requires_grad=True), torch.randn(E, 8)
    made = route.gate(hidden, weight, K, ids=recorded, return_logits=True)
    again = route(made.logits.detach(), K, ids=recorded)
    assert torch.equal(made.ids, again.ids)
    assert torch.equal(made.weights, again.weights)
    direction = torch.randn(T, K)
    (got,) = torch.autograd.grad(made.weights, hidden, direction)
    x = hidden.detach().double().requires_grad_()
    weights = exact(route.spec, recorded)(x @ weight.double().t())
    (wanted,) = torch.autograd.grad(weights, x, direction.double())
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        compiled = torch.compile(route.gate, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(hidden, weight, K, ids=recorded).ids, made.ids)


def test_an_engines_padding_costs_nothing_and_the_rest_is_replayed():
    """Megatron and NeMo: engines hand over -1 for positions without a record."""
    route, logits, recorded = moe_routing.get_router("qwen3_moe"), drawn(), record()
    recorded[8:] = -1
    weights, ids = route(logits, K, ids=recorded.to(torch.int16), num_valid_tokens=10)
    plain = route(logits, K)
    assert torch.equal(ids[8:10], plain.ids[8:10])
    assert torch.equal(weights[8:10], plain.weights[8:10])
    assert (ids[10:] == -1).all()
    assert (weights[10:] == 0).all()
    assert ids[5:8].tolist() == recorded[5:8].tolist()
