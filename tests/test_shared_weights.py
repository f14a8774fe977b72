"""Weights of shared experts that a call brings, beyond what the kit's clause 19 checks."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from moe_routing import Router, RoutingSpec

SPEC = RoutingSpec(family="topk_softmax", renormalize=True, shared_experts=2, shared_weight=0.5)
ROUTE = Router(SPEC, backend="eager")


def test_the_kernels_own_columns_are_left_as_they_are():
    logits, shared = torch.randn(5, 8), torch.rand(5, 2)
    weights, ids = ROUTE(logits, 3, shared_weights=shared)
    plain = ROUTE(logits, 3)
    assert torch.equal(weights[:, :3], plain.weights[:, :3])
    assert torch.equal(weights[:, 3:], shared)
    assert torch.equal(ids, plain.ids)


def test_a_shared_expert_that_is_elsewhere_keeps_its_weight():
    elsewhere, shared = torch.full((10,), -1), torch.tensor([2.0, 3.0])
    weights, ids = ROUTE(torch.randn(4, 8), 3, expert_map=elsewhere, shared_weights=shared)
    assert (ids == -1).all()
    assert torch.equal(weights[:, 3:], shared.expand(4, 2))


def test_gradients_of_first_and_second_order():
    logits = torch.randn(4, 8, requires_grad=True)
    shared = torch.randn(4, 2, requires_grad=True)
    loss = ROUTE(logits, 3, shared_weights=shared).weights.square().sum()
    of_logits, first = torch.autograd.grad(loss, (logits, shared), create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), shared)
    assert torch.equal(first, 2 * shared)
    assert torch.equal(second, torch.full_like(shared, 2.0))
    (plain,) = torch.autograd.grad(ROUTE(logits, 3).weights.square().sum(), logits)
    torch.testing.assert_close(of_logits, plain)


def test_the_pairs_of_least_weight_are_those_of_the_weights_that_are_returned():
    logits, shared = torch.randn(6, 8), torch.rand(6, 2)
    shared[0] = 9.0
    planned = ROUTE.with_plan(logits, 3, shared_weights=shared, capacity=1, drop="least_weight")
    assert torch.equal(planned.weights[:, 3:], shared)
    first = planned.plan.inverse[:, 3:] < planned.plan.offsets[-1]
    assert first[0].all()
    assert not first[1:].any()


@pytest.mark.parametrize("times", [1, 3])
def test_a_plan_is_chosen_once(times):
    route = Router(SPEC, backend="eager")
    for _ in range(times):
        logits, shared = torch.randn(6, 8), torch.rand(6, 2)
        made = route.with_plan(logits, 3, shared_weights=shared)
        plain = ROUTE.with_plan(logits, 3)
        assert torch.equal(made.weights[:, 3:], shared)
        assert torch.equal(made.plan.order, plain.plan.order)
    assert [len(known.plans) for known in route._calls.cache.values()] == [1]


def test_a_plan_to_fill():
    logits, shared = torch.randn(6, 8), torch.rand(2)
    out = ROUTE.with_plan(logits, 3)
    made = ROUTE.with_plan(logits, 3, shared_weights=shared, out=out)
    assert made.weights is out.weights
    assert torch.equal(out.weights[:, 3:], shared.expand(6, 2))


def test_memory_that_a_call_writes_is_its_own():
    logits = torch.randn(5, 8)
    out = ROUTE(logits, 3)
    with pytest.raises(ValueError, match=r"^out: expected .* weights and shared_weights that"):
        ROUTE(logits, 3, shared_weights=out.weights[:, 3:], out=out)
    counts = torch.zeros(8, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^counts: expected .* overlaps shared_weights"):
        ROUTE(logits, 3, shared_weights=counts.view(torch.float32)[:2], counts=counts)
    shared = torch.rand(5, 2, requires_grad=True)
    with pytest.raises(ValueError, match=r"^out: expected None where gradients are wanted"):
        ROUTE(logits, 3, shared_weights=shared, out=out)
    with torch.no_grad():
        ROUTE(logits, 3, shared_weights=shared, out=out)
    assert torch.equal(out.weights[:, 3:], shared)


def test_a_wrong_argument_beside_another_is_named():
    out = ROUTE(torch.randn(5, 8), 3)
    with pytest.raises(TypeError, match=r"shared_weights: expected a float tensor"):
        ROUTE([1.0], 3, shared_weights=1.0, out=out)
    with pytest.raises(TypeError, match=r"^logits: "):
        ROUTE([1.0], 3, shared_weights=torch.rand(2), out=out)
    logits, shared = torch.randn(5, 8), torch.rand(2)
    with pytest.raises(ValueError, match=r"^out: "):
        ROUTE(logits, 3, shared_weights=shared, out=(out.weights.to_sparse(), out.ids))
    with pytest.raises(ValueError, match=r"^counts: "):
        ROUTE(logits, 3, shared_weights=shared, counts=torch.zeros(8).long().to_sparse())


def test_a_spec_must_have_shared_experts_that_padding_is_told_from():
    logits, shared = torch.randn(5, 8), torch.rand(2)
    with pytest.raises(ValueError, match=r"shared_weights: .* the spec has no shared_experts"):
        Router(SPEC.replace(shared_experts=0, shared_weight=1.0))(logits, 3, shared_weights=shared)
    with pytest.raises(ValueError, match=r"shared_weights: .* shared_weight is 0"):
        Router(SPEC.replace(shared_weight=0.0))(logits, 3, shared_weights=shared)


def test_a_gate_weighs_shared_experts_too():
    hidden, weight, shared = torch.randn(5, 16), torch.randn(8, 16), torch.rand(5, 2)
    options = {"shared_weights": shared, "valid": torch.arange(5) != 2}
    for _ in range(2):
        made = ROUTE.gate(hidden, weight, 3, return_logits=True, **options)
        routed = ROUTE(made.logits, 3, **options)
        assert torch.equal(made.weights, routed.weights)
        assert torch.equal(made.weights[:, 3:], shared * options["valid"][:, None])
    planned = ROUTE.gate.with_plan(hidden, weight, 3, capacity=1, drop="least_weight", **options)
    right = ROUTE.with_plan(made.logits, 3, capacity=1, drop="least_weight", **options)
    assert torch.equal(planned.weights, right.weights)
    assert torch.equal(planned.plan.order, right.plan.order)
    with pytest.raises(ValueError, match="shared_weights: expected a dense float tensor"):
        ROUTE.gate(hidden, weight, 3, shared_weights=torch.rand(3))


class Routes(torch.nn.Module):
    def forward(self, logits, shared, valid):
        return ROUTE(logits, 3, valid=valid, shared_weights=shared).weights


def test_compiled_once_and_exported_for_any_number_of_tokens():
    def operands(rows):
        return torch.randn(rows, 8), torch.rand(rows, 2), torch.arange(rows) % 3 != 1

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(Routes(), fullgraph=True, dynamic=True, backend=counter)
    tokens = torch.export.Dim("tokens")
    exported = torch.export.export(Routes(), operands(6), dynamic_shapes=({0: tokens},) * 3)
    frames = []
    for rows in (6, 4, 5):
        given = operands(rows)
        assert torch.equal(compiled(*given), Routes()(*given))
        assert torch.equal(exported.module()(*given), Routes()(*given))
        frames.append(counter.frame_count)
    assert len(set(frames)) == 1


def test_vmap_gives_each_batch_its_weights():
    logits, shared = torch.randn(2, 3, 8), torch.randn(2, 3, 2)
    valid = torch.ones(3, dtype=torch.bool)
    mapped = torch.vmap(lambda one, its: Routes()(one, its, valid))(logits, shared)
    assert torch.equal(
        mapped, torch.stack([Routes()(*both, valid) for both in zip(logits, shared, strict=True)])
    )


def test_two_numbers_in_an_element_are_refused_before_anything_is_written():
    logits, counts = torch.randn(5, 8), torch.zeros(8, dtype=torch.int32)
    packed = torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    with pytest.raises(TypeError, match=r"^shared_weights: expected a float tensor"):
        ROUTE(logits, 3, shared_weights=packed, counts=counts)
    assert not counts.any()


def test_out_cannot_hold_a_batch():
    logits, counts = torch.randn(5, 8), torch.zeros(8, dtype=torch.int32)
    planned = ROUTE.with_plan(logits, 3)
    before = planned.weights.clone()
    for route, out in ((ROUTE, planned[:2]), (ROUTE.with_plan, planned)):
        call = torch.vmap(
            lambda its, route=route, out=out: (
                route(logits, 3, shared_weights=its, counts=counts, out=out).weights
            )
        )
        with pytest.raises(ValueError, match=r"^out: expected None where gradients are wanted"):
            call(torch.rand(4, 5, 2))
    assert torch.equal(planned.weights, before)
    assert not counts.any()


@pytest.mark.parametrize("gated", [False, True])
def test_vmap_plans_by_the_weights_of_each_batch(gated):
    tensors = (torch.randn(5, 16), torch.randn(8, 16)) if gated else (torch.randn(5, 8),)
    call = (ROUTE.gate if gated else ROUTE).with_plan

    def order(its):
        planned = call(*tensors, 3, shared_weights=its, capacity=1, drop="least_weight")
        return planned.plan.order

    shared = torch.rand(4, 5, 2)
    each = torch.stack([order(its) for its in shared])
    assert torch.equal(torch.vmap(order)(shared), each)
