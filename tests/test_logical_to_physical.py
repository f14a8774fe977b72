"""``logical_to_physical=`` and ``replica_count=``: every call gives rows replicas by the rule."""

import warnings

import pytest
import torch
from fake_group import fake_group
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_routing
from moe_routing import balancing
from moe_routing.reference.counts_oracle import counted
from moe_routing.reference.replicas_oracle import physical

E, K, T, H, R = 16, 4, 9, 8, 3
SPEC = moe_routing.list_routers()["mixtral"]
SHARED = SPEC.replace(shared_experts=2)


def replicas(experts=E, most=R, dtype=torch.int64):
    return {
        "logical_to_physical": torch.arange(experts * most, dtype=dtype).view(experts, most),
        "replica_count": torch.arange(experts, dtype=dtype) % most + 1,
    }


@given(
    leading=st.lists(st.integers(0, 4), max_size=3),
    most=st.integers(1, 5),
    dtypes=st.tuples(*[st.sampled_from([torch.int32, torch.int64])] * 2),
    with_shared_mask_out=st.tuples(*[st.booleans()] * 3),
)
@settings(max_examples=40, deadline=None)
def test_rows_of_any_leading_shape_get_replicas(leading, most, dtypes, with_shared_mask_out):
    (dtype, ids_dtype), (shared, masked, given_out) = dtypes, with_shared_mask_out
    route = moe_routing.get_router(SHARED if shared else SPEC)
    given_replicas = replicas(E + 2 * shared, most, dtype)
    logits = torch.randn(*leading, E)
    options = {"valid": torch.rand(leading) < 0.5} if masked else {}
    plain = route(logits, K, ids_dtype=ids_dtype, **options)
    out = tuple(map(torch.empty_like, plain)) if given_out else None
    output = route(logits, K, ids_dtype=ids_dtype, out=out, **options, **given_replicas)
    rows = plain.ids.reshape(-1, plain.ids.shape[-1])
    assert torch.equal(output.weights, plain.weights)
    assert torch.equal(
        output.ids, physical(rows, **given_replicas).view(plain.ids.shape).to(ids_dtype)
    )
    assert out is None or output.ids.data_ptr() == out[1].data_ptr()


@given(
    loads=st.lists(st.integers(0, 1000), min_size=E, max_size=E),
    more=st.integers(0, 8),
    tokens=st.integers(0, 40),
)
@settings(max_examples=40, deadline=None)
def test_a_placement_shares_consecutive_tokens_evenly(loads, more, tokens):
    placement = balancing.place_replicas(torch.tensor(loads), num_slots=E + 2 * more, num_ranks=2)
    same = torch.randn(E).expand(tokens, E)
    ids = moe_routing.get_router(SPEC)(
        same,
        K,
        logical_to_physical=placement.logical_to_physical,
        replica_count=placement.replica_count,
    ).ids.long()
    logical = moe_routing.get_router(SPEC)(same, K).ids
    assert torch.equal(placement.physical_to_logical[ids], logical.long())
    shares = ids.flatten().bincount(minlength=E + 2 * more)
    for expert in logical[:1].flatten().tolist():
        count = int(placement.replica_count[expert])
        of_expert = shares[placement.logical_to_physical[expert, :count]]
        assert of_expert.min() >= tokens // count
        assert of_expert.max() <= -(-tokens // count)


def test_zero_experts_have_replicas_as_the_experts_that_they_are():
    spec = moe_routing.list_routers()["longcat_flash"]
    experts = 4 * spec.zero_experts
    operands = {"bias": torch.zeros(experts)} if spec.needs_bias else {}
    route, logits = moe_routing.get_router(spec), torch.randn(T, experts)
    plain = route(logits, K, **operands)
    output = route(logits, K, **operands, **replicas(experts))
    assert torch.equal(output.ids.long(), physical(plain.ids, **replicas(experts)))
    assert torch.equal(output.weights, plain.weights)


def test_a_plan_and_a_gate_get_replicas_and_count_logical_ids():
    route, logits = moe_routing.get_router(SHARED), torch.randn(T, E)
    hidden, weight = torch.randn(T, H), torch.randn(E, H)
    some = replicas(E + 2)
    for padding in ({}, {"num_valid_tokens": 4}, {"valid": torch.arange(T) % 2 == 0}):
        for what, inputs in (
            (route.with_plan, (logits, K)),
            (route.gate, (hidden, weight, K)),
            (route.gate.with_plan, (hidden, weight, K)),
        ):
            plans = getattr(what, "__name__", "") == "with_plan"
            arguments = padding | ({"num_experts": R * (E + 2)} if plans else {})
            counts = torch.zeros(E + 2, dtype=torch.int64)
            for times in (1, 2, 3):
                made = what(*inputs, **arguments, **some, counts=counts)
                plain = what(*inputs, **arguments)
                assert torch.equal(made.weights, plain.weights)
                assert torch.equal(made.ids.long(), physical(plain.ids, **some))
                assert torch.equal(counts, times * counted(plain.ids, E + 2))
                if plans:
                    expected = moe_routing.plan(made.ids, num_experts=R * (E + 2))
                    assert torch.equal(made.plan.order, expected.order)
                    assert torch.equal(made.plan.offsets, expected.offsets)


def test_a_plan_to_fill_is_of_replicas():
    route, logits = moe_routing.get_router(SPEC), torch.randn(T, E)
    made = route.with_plan(logits, K, num_experts=E * R, **replicas())
    out = type(made)(*map(torch.empty_like, made[:2]), _emptied(made.plan))
    for _ in range(2):
        filled = route.with_plan(logits, K, num_experts=E * R, **replicas(), out=out)
        assert torch.equal(out.ids, made.ids)
        assert torch.equal(filled.plan.order, made.plan.order)
        assert filled.plan.order.data_ptr() == out.plan.order.data_ptr()


def _emptied(plan):
    return type(plan)(*(None if part is None else torch.zeros_like(part) for part in plan))


def test_a_plan_needs_the_number_of_physical_experts():
    route, logits = moe_routing.get_router(SPEC), torch.randn(T, E)
    hidden, weight = torch.randn(T, H), torch.randn(E, H)
    route.with_plan(logits, K)
    for call in (
        lambda: route.with_plan(logits, K, **replicas()),
        lambda: route.gate.with_plan(hidden, weight, K, **replicas()),
    ):
        with pytest.raises(TypeError, match=r"^num_experts: expected an int, how many physical"):
            call()


def test_gradients_forward_mode_and_vmap():
    route, some = moe_routing.get_router(SPEC), replicas()
    logits = torch.randn(2, T, E)
    plain = torch.func.vmap(lambda x: tuple(route(x, K)))(logits)
    weights, ids = torch.func.vmap(lambda x: tuple(route(x, K, **some)))(logits)
    assert torch.equal(weights, plain[0])
    # Each element of the batch is a call of its own, whose rows begin at 0.
    assert torch.equal(ids.long(), torch.stack([physical(one, **some) for one in plain[1]]))
    gradient = torch.func.grad(lambda x: route(x, K, **some).weights.square().sum())(logits[0])
    assert torch.equal(
        gradient, torch.func.grad(lambda x: route(x, K).weights.square().sum())(logits[0])
    )
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(logits[0], torch.randn(T, E))
        output = route(dual, K, **some)
        assert torch.autograd.forward_ad.unpack_dual(output.weights).tangent is not None


def test_meta_and_fake_tensors_have_shapes():
    from torch._subclasses.fake_tensor import FakeTensorMode

    route = moe_routing.get_router(SPEC)
    with FakeTensorMode():
        out = torch.empty(T, K), torch.empty(T, K, dtype=torch.int32)
        for given_out in (None, out):
            output = route(torch.randn(T, E), K, **replicas(), out=given_out)
            assert output.ids.shape == (T, K)
    on_meta = {name: tensor.to("meta") for name, tensor in replicas().items()}
    assert route(torch.randn(T, E, device="meta"), K, **on_meta).ids.shape == (T, K)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_calls_get_replicas(dynamic):
    route, weight = moe_routing.get_router(SHARED), torch.randn(E, H)

    def layer(logits, hidden, some, counts):
        ids = route(logits, K, **some, counts=counts).ids
        of_batch = route(logits[None], K, **some).ids
        planned = route.with_plan(logits, K, num_experts=R * (E + 2), **some)
        gated = route.gate(hidden, weight, K, **some)
        return ids, of_batch, planned.ids, planned.plan.order, gated.ids

    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (T, T + 2):
        logits, hidden = torch.randn(tokens, E), torch.randn(tokens, H)
        some, counts = replicas(E + 2), torch.zeros(E, dtype=torch.int64)
        got = compiled(logits, hidden, some, counts)
        assert all(map(torch.equal, got, layer(logits, hidden, some, torch.zeros_like(counts))))
        assert counts.sum() == tokens * K


@pytest.mark.slow
def test_inductor_gives_replicas():
    route, some = moe_routing.get_router(SPEC), replicas()
    compiled = torch.compile(lambda logits: route(logits, K, **some).ids, fullgraph=True)
    for tokens in (T, T + 3):
        logits = torch.randn(tokens, E)
        assert torch.equal(compiled(logits), route(logits, K, **some).ids)


def test_an_exported_program_takes_any_number_of_tokens_and_another_table():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.route = moe_routing.get_router(SPEC)

        def forward(self, logits, table, count):
            return tuple(self.route(logits, K, logical_to_physical=table, replica_count=count))

    arguments = (torch.randn(T, E), *replicas().values())
    dynamic = {"logits": {0: torch.export.Dim("tokens")}, "table": None, "count": None}
    program = torch.export.export(Layer(), arguments, dynamic_shapes=dynamic).module()
    for tokens in (T, 2, 30):
        logits, some = torch.randn(tokens, E), replicas()
        some["logical_to_physical"] = some["logical_to_physical"].flip(0)
        ids = moe_routing.get_router(SPEC)(logits, K).ids
        assert torch.equal(program(logits, *some.values())[1].long(), physical(ids, **some))


def test_shadow_mode_compares_calls_with_replicas():
    route = moe_routing.Router(SPEC, verify=True)
    route(torch.randn(T, E), K, **replicas())
    assert (route.health().compared, route.health().ok) == (1, True)


def test_dtensors_are_refused():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate

    with fake_group(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mesh = init_device_mesh("cpu", (2,))
        logits = DTensor.from_local(torch.randn(T, E), mesh, [Replicate()])
        with pytest.raises(TypeError, match=r"^logical_to_physical: expected None with DTensors"):
            moe_routing.get_router(SPEC)(logits, K, **replicas())


TABLE, COUNT = replicas().values()
OF_TABLE, OF_COUNT = r"logical_to_physical: expected ", r"replica_count: expected "
WRONG = [
    (TABLE, None, TypeError, OF_COUNT + r"an int32 .*\[E\] with logical_to_physical, got None"),
    (None, COUNT, TypeError, OF_TABLE + r"an int32 .*\[E, R\] with replica_count, got None"),
    (TABLE.float(), COUNT, TypeError, OF_TABLE + r"an int32 or int64 tensor \[16, R\] of R >= 1"),
    (TABLE.tolist(), COUNT, TypeError, OF_TABLE + r"an int32 or int64 tensor \[16, R\]"),
    (TABLE[1:], COUNT, ValueError, OF_TABLE + r".* got a Tensor of shape \[15, 3\]"),
    (TABLE[:, :0], COUNT, ValueError, OF_TABLE + r".* got a Tensor of shape \[16, 0\]"),
    (TABLE[:, 0], COUNT, ValueError, OF_TABLE + r".* got a Tensor of shape \[16\]"),
    (TABLE[:, :1].expand(E, 2**27), COUNT, ValueError, OF_TABLE + r".* 16 \* R < 2\*\*31, got"),
    (TABLE.to_sparse(), COUNT, ValueError, OF_TABLE + r"a dense tensor"),
    (TABLE.to("meta"), COUNT, ValueError, OF_TABLE + r"a tensor on cpu, as the logits"),
    (TABLE, COUNT.short(), TypeError, OF_COUNT + r"an int32 or int64 tensor \[16\]"),
    (TABLE, [1] * E, TypeError, OF_COUNT + r"an int32 or int64 tensor \[16\]"),
    (TABLE, COUNT[1:], ValueError, OF_COUNT + r"a dense tensor \[16\], got a Tensor of shape"),
    (TABLE, COUNT[:, None], ValueError, OF_COUNT + r"a dense tensor \[16\]"),
    (TABLE, COUNT.to("meta"), ValueError, OF_COUNT + r"a tensor on cpu, as the logits"),
]  # fmt: skip


def _calls(**options):
    route, logits = moe_routing.get_router(SPEC), torch.randn(T, E)
    hidden, weight = torch.randn(T, H), torch.randn(E, H)
    out = torch.full((T, K), -7.0), torch.full((T, K), -7, dtype=torch.int32)
    yield lambda: route(logits, K, out=out, **options)
    yield lambda: route(logits[None], K, **options)
    yield lambda: route.with_plan(logits, K, num_experts=E * R, **options)
    yield lambda: route.gate(hidden, weight, K, **options)
    yield lambda: route.gate.with_plan(hidden, weight, K, num_experts=E * R, **options)
    assert (out[0] == -7).all()
    assert (out[1] == -7).all()


@pytest.mark.parametrize(("table", "count", "error", "said"), WRONG)
@pytest.mark.parametrize("counting", [False, True])
def test_wrong_replicas_are_named_and_nothing_is_written(table, count, error, said, counting):
    counts = torch.zeros(E, dtype=torch.int64)
    more = {"counts": counts} if counting else {}
    for call in _calls(logical_to_physical=table, replica_count=count, **more):
        with pytest.raises(error, match=f"^{said}"):
            call()
    assert not counts.any()


def test_a_map_beside_replicas_is_refused():
    for call in _calls(**replicas(), expert_map=torch.arange(E)):
        with pytest.raises(ValueError, match=f"^{OF_TABLE}None with expert_map: one renames"):
            call()


def test_memory_that_is_shared_with_an_output_is_refused():
    route, logits = moe_routing.get_router(SPEC), torch.randn(T, E)
    memory = torch.zeros(E * R, dtype=torch.int64)
    weights, ids = torch.empty(T, K), memory.view(torch.int32)[: T * K].view(T, K)
    for some in (
        replicas() | {"logical_to_physical": memory.view(E, R)},
        replicas() | {"replica_count": memory[:E]},
    ):
        with pytest.raises(
            ValueError, match=r"^out: .* ids and (logical|replica)_\w+ that overlap"
        ):
            route(logits, K, out=(weights, ids), **some)
    made = route.with_plan(logits, K, num_experts=E * R, **replicas())
    order = memory.view(made.plan.order.dtype)[: made.plan.order.numel()]
    out = made._replace(plan=_emptied(made.plan)._replace(order=order))
    with pytest.raises(ValueError, match=r"^out: .* order and logical_to_physical that overlap"):
        route.with_plan(
            logits, K, num_experts=E * R, out=out, replica_count=COUNT,
            logical_to_physical=memory.view(E, R),
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"^counts: .* 'one that overlaps replica_count'"):
        route(logits, K, counts=memory[:E], logical_to_physical=TABLE, replica_count=memory[:E])
    assert not memory.any()
