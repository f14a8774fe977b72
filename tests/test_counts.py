"""``counts=``: what users of routers see. The kit has the maths (clause 17)."""

import warnings

import pytest
import torch
from fake_group import fake_group
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_routing
from moe_routing.reference.counts_oracle import counted

E, K, T, H = 16, 4, 9, 8
SPEC = moe_routing.list_routers()["mixtral"]
SHARED = SPEC.replace(shared_experts=2)


def zeros(length=E, dtype=torch.int64):
    return torch.zeros(length, dtype=dtype)


def test_calls_add_up():
    route, counts = moe_routing.get_router("mixtral"), zeros()
    expected = zeros()
    for _ in range(3):
        ids = route(torch.randn(T, E), K, counts=counts).ids
        expected += counted(ids, E)
    assert torch.equal(counts, expected)
    assert counts.sum() == 3 * T * K


@given(
    leading=st.lists(st.integers(0, 3), max_size=3),
    shared=st.booleans(),
    columns=st.booleans(),
    start=st.integers(-5, 5),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
@settings(max_examples=30, deadline=None)
def test_any_leading_shape_is_counted(leading, shared, columns, start, dtype):
    route = moe_routing.get_router(SHARED if shared else SPEC)
    length = E + 2 if shared and columns else E
    counts = torch.full((length,), start, dtype=dtype)
    logits = torch.randn(*leading, E)
    output = route(logits, K, counts=counts)
    plain = route(logits, K)
    assert torch.equal(output.ids, plain.ids)
    assert torch.equal(output.weights, plain.weights)
    assert torch.equal(counts, start + counted(plain.ids, length).to(dtype))


def test_a_map_renames_after_counting():
    route, logits = moe_routing.get_router("mixtral"), torch.randn(T, E)
    everything_in_one_place = torch.full((E,), 2**40 + 3)
    counts = zeros()
    out = torch.empty(T, K), torch.empty(T, K, dtype=torch.int64)
    plain = route(logits, K, ids_dtype=torch.int64)
    for given_out in (None, out):
        output = route(
            logits,
            K,
            expert_map=everything_in_one_place,
            ids_dtype=torch.int64,
            counts=counts,
            out=given_out,
        )
        assert (output.ids == 2**40 + 3).all()
        assert torch.equal(output.weights, plain.weights)
    assert torch.equal(out[1], output.ids)
    assert torch.equal(counts, 2 * counted(plain.ids, E))


def test_a_plan_and_a_gate_count_once():
    route, logits = moe_routing.get_router(SHARED), torch.randn(T, E)
    hidden, weight = torch.randn(T, H), torch.randn(E, H)
    places = torch.randperm(E + 2)
    for padding in ({}, {"num_valid_tokens": 4}, {"valid": torch.arange(T) % 2 == 0}):
        for mapped in ({}, {"expert_map": places}):
            for what, inputs in (
                (route.with_plan, (logits, K)),
                (route.gate, (hidden, weight, K)),
                (route.gate.with_plan, (hidden, weight, K)),
            ):
                plans = getattr(what, "__name__", "") == "with_plan"
                arguments = padding | mapped | ({"num_experts": E + 2} if plans else {})
                counts = zeros(E + 2)
                for times in (1, 2, 3):
                    made = what(*inputs, **arguments, counts=counts)
                    plain = what(*inputs, **arguments)
                    assert torch.equal(made.ids, plain.ids)
                    assert torch.equal(made.weights, plain.weights)
                    logical = what(*inputs, **(arguments | {"expert_map": None})).ids
                    assert torch.equal(counts, times * counted(logical, E + 2))
                    if hasattr(made, "plan"):
                        assert torch.equal(made.plan.order, plain.plan.order)


def test_a_gate_that_returns_logits_counts_what_it_routes():
    gate, counts = moe_routing.get_router("mixtral").gate, zeros()
    made = gate(torch.randn(T, H), torch.randn(E, H), K, return_logits=True, counts=counts)
    assert torch.equal(counts, counted(made.ids, E))
    assert made.logits.shape == (T, E)


def test_gradients_flow_as_without_counts():
    route = moe_routing.get_router("mixtral")
    logits = torch.randn(T, E)
    gradients = []
    for counts in (None, zeros()):
        leaf = logits.clone().requires_grad_()
        places = torch.randperm(E)
        route(leaf, K, counts=counts, expert_map=places).weights.square().sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)
    assert counts.sum() == T * K
    assert not counts.requires_grad


def test_zero_experts_count_as_the_experts_that_they_are():
    spec = moe_routing.list_routers()["longcat_flash"]
    assert spec.zero_experts
    experts = 4 * spec.zero_experts
    counts = zeros(experts)
    operands = {"bias": torch.zeros(experts)} if spec.needs_bias else {}
    ids = moe_routing.get_router(spec)(torch.randn(T, experts), K, counts=counts, **operands).ids
    assert torch.equal(counts, counted(ids, experts))
    assert (ids >= experts - spec.zero_experts).any()


def test_slots_of_a_record_without_an_expert_are_not_counted():
    record = torch.full((2, K), -1)
    record[0, 2], record[1] = 5, 7
    counts = zeros()
    moe_routing.get_router("mixtral")(torch.randn(2, E), K, ids=record, counts=counts)
    expected = zeros()
    expected[5], expected[7] = 1, K
    assert torch.equal(counts, expected)


def test_an_int32_count_wraps_and_an_int64_one_goes_on():
    route = moe_routing.get_router("mixtral")
    logits = torch.zeros(2, E)
    for dtype, expected in ((torch.int32, -(2**31) + 1), (torch.int64, 2**31 + 1)):
        counts = torch.full((E,), 2**31 - 1, dtype=dtype)
        route(logits, K, counts=counts)
        assert counts[0] == expected


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad])
def test_inside_torch_func_counts_are_refused(transform):
    route, counts = moe_routing.get_router("mixtral"), zeros()

    def weigh(logits):
        return route(logits, K, counts=counts).weights.square().sum()

    with pytest.raises(TypeError, match=r"^counts: expected None inside a transform of torch.func"):
        transform(weigh)(torch.randn(2, T, E))
    assert not counts.any()


def test_forward_mode_counts():
    route, counts = moe_routing.get_router("mixtral"), zeros()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.randn(T, E), torch.randn(T, E))
        output = route(dual, K, counts=counts)
        assert torch.autograd.forward_ad.unpack_dual(output.weights).tangent is not None
    assert torch.equal(counts, counted(output.ids, E))


def test_inference_mode_counts_into_a_tensor_of_either_mode():
    route, outside = moe_routing.get_router("mixtral"), zeros()
    with torch.inference_mode():
        inside = zeros()
        for counts in (outside, inside):
            route(torch.randn(T, E), K, counts=counts)
            assert counts.sum() == T * K
    with pytest.raises(ValueError, match=r"^counts: expected tensors that can be written here"):
        route(torch.randn(T, E), K, counts=inside)


def test_dtensors_are_refused():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate

    with fake_group(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mesh = init_device_mesh("cpu", (2,))
        logits = DTensor.from_local(torch.randn(T, E), mesh, [Replicate()])
        with pytest.raises(TypeError, match=r"^counts: expected None with DTensors"):
            moe_routing.get_router("mixtral")(logits, K, counts=zeros())


def test_meta_and_fake_tensors_are_counted_in_shape_alone():
    from torch._subclasses.fake_tensor import FakeTensorMode

    route = moe_routing.get_router("mixtral")
    with FakeTensorMode():
        out = torch.empty(T, K), torch.empty(T, K, dtype=torch.int32)
        for given_out in (None, out):
            output = route(torch.randn(T, E), K, counts=zeros(), out=given_out)
            assert output.ids.shape == (T, K)
    on_meta = torch.randn(T, E, device="meta")
    assert route(on_meta, K, counts=zeros().to("meta")).ids.shape == (T, K)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_calls_count(dynamic):
    route, places = moe_routing.get_router(SHARED), torch.randperm(E + 2)
    weight = torch.randn(E, H)

    def layer(logits, hidden, counts):
        ids = route(logits, K, counts=counts, expert_map=places).ids
        planned = route.with_plan(logits, K, counts=counts, num_experts=E + 2)
        gated = route.gate(hidden, weight, K, counts=counts)
        return ids, planned.ids, gated.ids

    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (T, T + 2):
        logits, hidden = torch.randn(tokens, E), torch.randn(tokens, H)
        counts, expected = zeros(E), zeros(E)
        got, plain = compiled(logits, hidden, counts), layer(logits, hidden, expected)
        assert all(map(torch.equal, got, plain))
        assert torch.equal(counts, expected)
        assert counts.sum() == 3 * tokens * K


@pytest.mark.slow
def test_inductor_counts():
    route = moe_routing.get_router("mixtral")
    compiled = torch.compile(lambda logits, counts: route(logits, K, counts=counts), fullgraph=True)
    counts = zeros()[None].expand(3, E).clone().t()[:, 1]
    for times in (1, 2):
        ids = compiled(torch.ones(T, E), counts).ids
        assert torch.equal(counts, times * counted(ids, E))


def test_an_exported_program_counts():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("counts", zeros())
            self.route = moe_routing.get_router("mixtral")

        def forward(self, logits):
            return tuple(self.route(logits, K, counts=self.counts))

    logits = torch.randn(T, E)
    program = torch.export.export(Layer(), (logits,)).module()
    for times in (1, 2):
        _, ids = program(logits)
        assert torch.equal(program.counts, times * counted(ids, E))


def test_shadow_mode_compares_counted_calls():
    route = moe_routing.Router(SPEC, verify=True)
    route(torch.randn(T, E), K, counts=zeros(), expert_map=torch.randperm(E))
    assert (route.health().compared, route.health().ok) == (1, True)


WRONG = [
    (lambda: zeros(dtype=torch.int16), TypeError, r"an int32 or int64 tensor \[16\], got a Tensor"),
    (lambda: torch.zeros(E), TypeError, r"an int32 or int64 tensor \[16\]"),
    (lambda: [0] * E, TypeError, r"an int32 or int64 tensor \[16\]"),
    (lambda: zeros(E - 1), ValueError, r"a dense tensor \[16\], got a Tensor of shape \[15\]"),
    (lambda: zeros(E + 2), ValueError, r"a dense tensor \[16\]"),
    (lambda: zeros()[None], ValueError, r"a dense tensor \[16\], got a Tensor of shape \[1, 16\]"),
    (lambda: zeros().to_sparse(), ValueError, r"a dense tensor \[16\]"),
    (lambda: zeros().to("meta"), ValueError, "a tensor on cpu, as the logits"),
    (lambda: zeros(1).expand(E), ValueError, "an element of its own for each expert"),
    (
        lambda: torch._efficientzerotensor((E,), dtype=torch.int64),
        ValueError,
        "tensors that can be written",
    ),
]


@pytest.mark.parametrize(("wrong", "error", "said"), WRONG)
@pytest.mark.parametrize("warm", [False, True])
def test_wrong_counts_are_named_and_nothing_is_written(wrong, error, said, warm):
    route, logits = moe_routing.get_router("mixtral"), torch.randn(T, E)
    hidden, weight = torch.randn(T, H), torch.randn(E, H)
    out = torch.full((T, K), -7.0), torch.full((T, K), -7, dtype=torch.int32)
    if warm:
        route(logits, K, counts=zeros())
    for call in (
        lambda: route(logits, K, counts=wrong(), out=out),
        lambda: route(logits[None], K, counts=wrong()),
        lambda: route.with_plan(logits, K, counts=wrong()),
        lambda: route.gate(hidden, weight, K, counts=wrong()),
        lambda: route.gate.with_plan(hidden, weight, K, counts=wrong()),
    ):
        with pytest.raises(error, match=f"^counts: expected {said}"):
            call()
    assert (out[0] == -7).all()
    assert (out[1] == -7).all()


def test_shared_memory_is_refused():
    route = moe_routing.get_router("mixtral")
    memory = torch.zeros(T * E, dtype=torch.int64)
    logits = memory.view(torch.float32)[: T * E].view(T, E)
    ids = memory.view(torch.int32)[: T * K].view(T, K)
    table = {"expert_map": memory[:E]}
    for overlapped, counts, arguments in (
        ("logits", memory[:E], {"logits": logits}),
        ("expert_map", memory[8 : 8 + E], table),
        ("the ids of out", memory[:E], {"out": (torch.empty(T, K), ids)}),
        ("num_valid_tokens", memory[::2][:E], {"num_valid_tokens": memory[30]}),
        ("valid", memory[:E], {"valid": memory.view(torch.bool)[:T]}),
        ("ids", memory[:E], {"ids": memory[: T * K].view(T, K)}),
    ):
        arguments.setdefault("logits", torch.randn(T, E))
        with pytest.raises(ValueError, match=f"^counts: .* got 'one that overlaps {overlapped}'"):
            route(arguments.pop("logits"), K, counts=counts, **arguments)
    assert not memory.any()


def test_a_wrong_map_is_named_before_anything_is_counted():
    route, counts = moe_routing.get_router("mixtral"), zeros()
    hidden, weight, logits = torch.randn(T, H), torch.randn(E, H), torch.randn(T, E)
    for places in (torch.zeros(E - 1, dtype=torch.int64), torch.zeros(E), [0] * E):
        for call in (
            lambda given: route(logits, K, **given),
            lambda given: route.with_plan(logits, K, num_experts=E, **given),
            lambda given: route.gate(hidden, weight, K, **given),
            lambda given: route.gate.with_plan(hidden, weight, K, num_experts=E, **given),
        ):
            with pytest.raises((TypeError, ValueError), match=r"^expert_map: expected "):
                call({"counts": counts, "expert_map": places})
    places = torch.zeros(T * K, dtype=torch.int32)
    out = torch.empty(T, K), places.view(T, K)
    with pytest.raises(ValueError, match=r"^out: .* ids and expert_map that overlap"):
        route(logits, K, counts=counts, expert_map=places[:E], out=out)
    assert not counts.any()


@pytest.mark.parametrize("logits", [[1.0], torch.zeros(()), torch.zeros(2, E).to_sparse(), None])
def test_wrong_logits_are_named_with_counts_too(logits):
    with pytest.raises((TypeError, ValueError), match=r"^logits: expected "):
        moe_routing.get_router("mixtral")(logits, K, counts=zeros())
