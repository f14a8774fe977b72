"""Outputs that the caller gives.

The tests say what they may share memory with, and when they cannot be written.
"""

from __future__ import annotations

import pytest
import torch

from moe_routing import Router, RoutingOutput, RoutingSpec, get_router

T, E, K = 4, 8, 2
SPEC = RoutingSpec(
    family="f", renormalize=True, per_expert_scale=True, selection="scores_plus_bias"
)
TABLE = RoutingSpec(family="f", selection="token_table")


def pages(dtype=torch.float32):
    """Return memory that every tensor of a call fits into: the call's tensors are views of it."""
    return torch.zeros(64, dtype=torch.int64).view(dtype)


def call(spec=SPEC, **changes):
    """Return the arguments of a call whose tensors share nothing."""
    arguments = {"logits": torch.randn(T, E), "topk": K, "out": outputs()}
    if spec.selection == "token_table":
        arguments |= {
            "token_ids": torch.arange(T),
            "expert_table": torch.arange(T * K).view(T, K) % E,
        }
    else:
        arguments |= {"per_expert_scale": torch.ones(E), "bias": torch.zeros(E)}
    return arguments | changes


def outputs(ids_dtype=torch.int32):
    return torch.empty(T, K), torch.empty(T, K, dtype=ids_dtype)


def in_memory_of(value, output, *, behind=True):
    """Return the value and the output in one memory.

    The first element of one has the address of the last element of the other.
    """
    first, second = (value, output) if behind else (output, value)
    begin = (first.nbytes - 1) // second.element_size()
    memory = pages(first.dtype)
    one = memory[: first.numel()].view(first.shape)
    other = memory.view(second.dtype)[begin : begin + second.numel()].view(second.shape)
    shared, output = (one, other) if behind else (other, one)
    return shared.copy_(value), output


def refused(route, both, **arguments):
    with pytest.raises(
        ValueError, match=r"^out: expected tensors that share no memory .*, got "
    ) as raised:
        route(**arguments)
    assert str(raised.value).endswith(f"got {both} that overlap")


def test_weights_and_ids_in_one_memory_are_refused():
    route, logits, memory = get_router("mixtral"), torch.randn(T, E), torch.empty(T, K)
    for _ in range(2):
        refused(
            route, "weights and ids", logits=logits, topk=K, out=(memory, memory.view(torch.int32))
        )
        route(logits, K, out=outputs())


@pytest.mark.parametrize("which", ["weights", "ids"])
@pytest.mark.parametrize(
    ("spec", "operand"),
    [
        *(
            (SPEC, name)
            for name in ("logits", "per_expert_scale", "bias", "num_valid_tokens", "expert_map")
        ),
        *((TABLE, name) for name in ("token_ids", "expert_table")),
    ],
)
def test_an_output_in_the_memory_of_an_operand_is_refused_in_later_calls_too(spec, operand, which):
    extra = {"num_valid_tokens": torch.tensor([3]), "expert_map": torch.arange(E)}
    arguments = call(spec, **({operand: extra[operand]} if operand in extra else {}))
    route = Router(spec)
    for behind in (True, False, True):
        route(**arguments)
        place = ("weights", "ids").index(which)
        shared, output = in_memory_of(arguments[operand], arguments["out"][place], behind=behind)
        out = tuple(output if n == place else given for n, given in enumerate(arguments["out"]))
        before = shared.clone()
        refused(route, f"{which} and {operand}", **{**arguments, operand: shared, "out": out})
        assert torch.equal(shared, before)


def test_a_call_that_was_refused_is_not_remembered_as_good():
    route, arguments = Router(SPEC), call()
    shared, output = in_memory_of(arguments["logits"], arguments["out"][0])
    for _ in range(2):
        refused(
            route,
            "weights and logits",
            **{**arguments, "logits": shared, "out": (output, arguments["out"][1])},
        )
    route(**arguments)


def test_memory_that_torch_did_not_allocate_is_seen_too():
    np = pytest.importorskip("numpy")
    array = np.zeros((T, E), dtype=np.float32)
    weights = torch.from_numpy(array.reshape(-1)[: T * K].reshape(T, K))
    arguments = call(logits=torch.from_numpy(array), out=(weights, outputs()[1]))
    refused(Router(SPEC), "weights and logits", **arguments)


def test_views_of_one_storage_that_lie_apart_are_written():
    memory = torch.zeros(T * E + 2 * T * K)
    logits, weights, ids = memory[: T * E], memory[T * E : T * E + T * K], memory[T * E + T * K :]
    logits = logits.view(T, E).copy_(torch.randn(T, E))
    out = RoutingOutput(weights.view(T, K), ids.view(torch.int32).view(T, K))
    route, arguments = Router(SPEC), call()
    expected = route(**{**arguments, "logits": logits.clone()})
    for _ in range(2):
        given = route(**{**arguments, "logits": logits, "out": out})
        assert given.weights is out.weights
        assert torch.equal(out.weights, expected.weights)
        assert torch.equal(out.ids, expected.ids)


def test_operands_may_share_memory_with_each_other():
    vector = torch.linspace(0.5, 1, E)
    route = Router(SPEC)
    expected = route(
        **call(
            logits=vector.clone().expand(T, E), per_expert_scale=vector.clone(), bias=vector.clone()
        )
    )
    weights, ids = route(**call(logits=vector.expand(T, E), per_expert_scale=vector, bias=vector))
    assert torch.equal(weights, expected.weights)
    assert torch.equal(ids, expected.ids)


def test_outputs_on_a_device_without_memory_overlap_nothing():
    with torch.device("meta"):
        logits, out = torch.empty(T, E), outputs()
    for _ in range(2):
        assert get_router("mixtral", backend="eager")(logits, K, out=out).ids is out[1]


def test_no_tokens_overlap_nothing():
    scale = torch.ones(E)
    out = scale[3:3].view(0, K), scale[4:4].view(torch.int32).view(0, K)
    assert get_router("gemma4")(torch.empty(0, E), K, scale, out=out).ids is out[1]


def test_weights_that_require_a_gradient_are_refused_by_name_unless_no_gradients_are_recorded():
    route, logits = get_router("mixtral"), torch.randn(T, E)
    out = torch.empty(T, K, requires_grad=True), torch.empty(T, K, dtype=torch.int32)
    for _ in range(2):  # a call like one that passed is checked again
        with torch.no_grad():
            assert route(logits, K, out=out).weights is out[0]
        with pytest.raises(
            ValueError,
            match=r"^out: expected tensors that require no gradient, got weights that do; use",
        ):
            route(logits, K, out=out)


def test_outputs_that_were_made_in_inference_mode_are_refused_by_name_outside():
    route, logits = get_router("mixtral"), torch.randn(T, E)
    with torch.inference_mode():
        out = outputs()
    for _ in range(2):
        with torch.inference_mode():
            assert route(logits, K, out=out).weights is out[0]
        with pytest.raises(
            ValueError,
            match=r"^out: expected tensors that can be written here, got inference tensors",
        ):
            route(logits, K, out=out)


def test_a_compiled_function_writes_outputs_after_it_has_read_everything():
    route, logits = get_router("mixtral"), torch.randn(T, E)
    expected = route(logits, K)
    memory = logits.clone()
    weights, ids = memory.view(-1)[: T * K].view(T, K), torch.empty(T, K, dtype=torch.int32)
    torch.compile(lambda x, w, i: route(x, K, out=(w, i)), fullgraph=True, backend="aot_eager")(
        memory, weights, ids
    )
    assert torch.equal(weights, expected.weights)
    assert torch.equal(ids, expected.ids)
