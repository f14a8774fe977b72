from __future__ import annotations

import re

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import moe_routing
from moe_routing import Router, RoutingOutput, RoutingSpec
from moe_routing._registry import registry
from moe_routing.reference import oracle
from moe_routing_registry import BackendSpec, Target

E, K, T = 8, 2, 3
LOGITS = torch.zeros(T, E)
SCALE = torch.ones(E)


def build_never(_problem, _device):
    msg = "a backend was asked to build for input that is wrong"
    raise AssertionError(msg)


def router(**fields):
    return Router(RoutingSpec(family="f", **fields), backend="never")


@pytest.fixture(autouse=True)
def _never_launch():
    """Fail if bad input gets as far as a backend."""
    registry().register(
        BackendSpec(
            name="never", factories={"route": f"{__name__}:build_never"}, targets=(Target("*"),)
        )
    )
    yield
    registry().unregister("never")


class NoIndex:
    def __index__(self):
        raise OSError


META = torch.zeros(E, device="meta")
CASES = {
    "logits is no tensor": ({}, {"logits": [[1.0]]}, TypeError, "logits: expected a tensor"),
    "logits are integers": (
        {},
        {"logits": torch.zeros(T, E, dtype=torch.int64)},
        TypeError,
        "logits: expected a dtype among",
    ),
    "logits of rank 0": (
        {},
        {"logits": torch.zeros(())},
        ValueError,
        r"logits: expected a dense tensor \[..., E\]",
    ),
    "sparse logits": (
        {},
        {"logits": torch.zeros(T, E).to_sparse()},
        ValueError,
        "logits: expected a dense tensor",
    ),
    "no topk": ({}, {"topk": None}, TypeError, "topk: expected an int"),
    "topk is a float": ({}, {"topk": 2.0}, TypeError, "topk: expected an int, got 2.0"),
    "topk is a bool": ({}, {"topk": True}, TypeError, "topk: expected an int, got True"),
    "topk is 0": (
        {},
        {"topk": 0},
        ValueError,
        r"topk: expected 1 <= topk <= num_experts \(8\), got 0",
    ),
    "topk is negative": (
        {},
        {"topk": -1},
        ValueError,
        r"topk: expected 1 <= topk <= num_experts \(8\), got -1",
    ),
    "topk whose index cannot be had": (
        {},
        {"topk": NoIndex()},
        TypeError,
        "topk: expected an int, got ",
    ),
    "valid tokens whose index cannot be had": (
        {},
        {"num_valid_tokens": NoIndex()},
        TypeError,
        "num_valid_tokens: expected an int or an integer tensor, got ",
    ),
    "topk above E": (
        {},
        {"topk": 9},
        ValueError,
        r"topk: expected 1 <= topk <= num_experts \(8\), got 9",
    ),
    "groups that do not divide E": (
        {"num_groups": 3},
        {},
        ValueError,
        r"num_groups: expected a divisor of num_experts \(8\), got 3",
    ),
    "groups too few for topk": (
        {"num_groups": 4, "topk_groups": 1},
        {"topk": 3},
        ValueError,
        r"topk: expected at most topk_groups \* \(num_experts / num_groups\) = 2, got 3",
    ),
    "partitions that do not divide topk": (
        {"num_groups": 4, "topk_per_group": True},
        {"topk": 3},
        ValueError,
        r"topk: expected a multiple of num_groups \(4\)",
    ),
    "zero experts above E": ({"zero_experts": 9}, {}, ValueError, "zero_experts: expected at most"),
    "scale is missing": (
        {"per_expert_scale": True},
        {},
        TypeError,
        r"per_expert_scale: expected a float tensor \[8\], got None",
    ),
    "scale is too short": (
        {"per_expert_scale": True},
        {"per_expert_scale": torch.ones(7)},
        ValueError,
        r"per_expert_scale: expected shape \[8\], got \[7\]",
    ),
    "scale of rank 2": (
        {"per_expert_scale": True},
        {"per_expert_scale": torch.ones(1, 8)},
        ValueError,
        "per_expert_scale: expected shape",
    ),
    "scale of integers": (
        {"per_expert_scale": True},
        {"per_expert_scale": SCALE.int()},
        TypeError,
        "per_expert_scale: expected a float dtype",
    ),
    "scale elsewhere": (
        {"per_expert_scale": True},
        {"per_expert_scale": META},
        ValueError,
        "per_expert_scale: expected the logits' device cpu, got meta",
    ),
    "scale nobody takes": (
        {},
        {"per_expert_scale": SCALE},
        ValueError,
        "per_expert_scale: expected None, because this router's spec",
    ),
    "bias is missing": (
        {"selection": "scores_plus_bias"},
        {},
        TypeError,
        "bias: expected a float tensor",
    ),
    "bias is a list": (
        {"selection": "scores_plus_bias"},
        {"bias": [0.0] * E},
        TypeError,
        "bias: expected a float tensor",
    ),
    "bias is too long": (
        {"selection": "scores_plus_bias"},
        {"bias": torch.zeros(9)},
        ValueError,
        r"bias: expected shape \[8\], got \[9\]",
    ),
    "bias elsewhere": (
        {"selection": "scores_plus_bias"},
        {"bias": META},
        ValueError,
        "bias: expected the logits' device",
    ),
    "bias nobody takes": ({}, {"bias": SCALE}, ValueError, "bias: expected None"),
    "token ids are missing": (
        {"selection": "token_table"},
        {},
        TypeError,
        "token_ids: expected an int32 or int64 tensor",
    ),
    "token ids of floats": (
        {"selection": "token_table"},
        {"token_ids": torch.zeros(T)},
        TypeError,
        "token_ids: expected an int32 or int64 dtype",
    ),
    "token ids too few": (
        {"selection": "token_table"},
        {"token_ids": torch.zeros(T - 1, dtype=torch.int64)},
        ValueError,
        r"token_ids: expected shape \[3\], got \[2\]",
    ),
    "table is missing": (
        {"selection": "token_table"},
        {"token_ids": torch.zeros(T, dtype=torch.int64)},
        TypeError,
        "expert_table: expected",
    ),
    "table with K + 1 columns": (
        {"selection": "token_table"},
        {
            "token_ids": torch.zeros(T, dtype=torch.int64),
            "expert_table": torch.zeros(5, K + 1, dtype=torch.int64),
        },
        ValueError,
        r"expert_table: expected shape \[vocabulary, 2\], got \[5, 3\]",
    ),
    "table of floats": (
        {"selection": "token_table"},
        {"token_ids": torch.zeros(T, dtype=torch.int64), "expert_table": torch.zeros(5, K)},
        TypeError,
        "expert_table: expected dtype int32 or int64",
    ),
    "table nobody takes": (
        {},
        {"expert_table": torch.zeros(5, K, dtype=torch.int64)},
        ValueError,
        "expert_table: expected None",
    ),
    "valid tokens is a float": (
        {},
        {"num_valid_tokens": 1.5},
        TypeError,
        "num_valid_tokens: expected an int",
    ),
    "valid tokens is negative": (
        {},
        {"num_valid_tokens": -1},
        ValueError,
        "num_valid_tokens: expected a number >= 0, got -1",
    ),
    "valid tokens has two elements": (
        {},
        {"num_valid_tokens": torch.zeros(2, dtype=torch.int32)},
        ValueError,
        (
            r"num_valid_tokens: expected an int, or an int32 or int64 tensor "
            r"of shape \[\] or \[1\], got a Tensor of shape \[2\]"
        ),
    ),
    "valid tokens of rank 2": (
        {},
        {"num_valid_tokens": torch.ones(1, 1, dtype=torch.int64)},
        ValueError,
        (
            r"num_valid_tokens: expected an int, .* tensor of shape \[\] or \[1\], "
            r"got a Tensor of shape \[1, 1\]"
        ),
    ),
    "valid tokens elsewhere": (
        {},
        {"num_valid_tokens": torch.zeros(1, dtype=torch.int32, device="meta")},
        ValueError,
        "num_valid_tokens: expected the logits' device",
    ),
    "scale of two numbers an element": (
        {"per_expert_scale": True},
        {"per_expert_scale": torch.zeros(8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)},
        TypeError,
        "per_expert_scale: expected a float dtype, got torch.float4_e2m1fn_x2",
    ),
    "map is too short": (
        {},
        {"expert_map": torch.zeros(7, dtype=torch.int32)},
        ValueError,
        r"expert_map: expected shape \[8\], got \[7\]",
    ),
    "map of floats": (
        {},
        {"expert_map": SCALE},
        TypeError,
        "expert_map: expected an int32 or int64 dtype",
    ),
    "map without the shared experts": (
        {"shared_experts": 2},
        {"expert_map": torch.zeros(8, dtype=torch.int32)},
        ValueError,
        r"expert_map: expected shape \[10\], got \[8\]",
    ),
    "ids of int16": (
        {},
        {"ids_dtype": torch.int16},
        TypeError,
        "ids_dtype: expected torch.int32 or torch.int64, got torch.int16",
    ),
    "out is one tensor": (
        {},
        {"out": (torch.zeros(T, K),)},
        TypeError,
        "out: expected a pair of tensors",
    ),
    "out of the wrong shape": (
        {},
        {"out": (torch.zeros(T, K + 1), torch.zeros(T, K, dtype=torch.int32))},
        ValueError,
        r"out: expected contiguous tensors of shape \[3, 2\]",
    ),
    "out with strides": (
        {},
        {"out": (torch.zeros(K, T).t(), torch.zeros(T, K, dtype=torch.int32))},
        ValueError,
        r"out: expected contiguous tensors",
    ),
    "out in bfloat16": (
        {},
        {"out": (torch.zeros(T, K, dtype=torch.bfloat16), torch.zeros(T, K, dtype=torch.int32))},
        TypeError,
        "out: expected float32 weights",
    ),
    "out against ids_dtype": (
        {},
        {
            "out": (torch.zeros(T, K), torch.zeros(T, K, dtype=torch.int32)),
            "ids_dtype": torch.int64,
        },
        ValueError,
        "out: expected ids of dtype torch.int64",
    ),
    "out with gradients": (
        {},
        {
            "logits": torch.zeros(T, E, requires_grad=True),
            "out": (torch.zeros(T, K), torch.zeros(T, K, dtype=torch.int32)),
        },
        ValueError,
        "out: expected None where gradients are wanted",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_by_name_before_any_launch(case):
    fields, arguments, error, message = CASES[case]
    arguments = {"logits": LOGITS, "topk": K, **arguments}
    with pytest.raises(error, match=f"^{message}"):
        router(**fields)(**arguments)


@pytest.mark.parametrize("case", ["topk above E", "scale is too short", "bias nobody takes"])
def test_bad_input_is_refused_when_the_kernel_is_bound_already(case):
    fields, arguments, error, message = CASES[case]
    route = Router(RoutingSpec(family="f", **fields))
    good = {"per_expert_scale": SCALE} if fields.get("per_expert_scale") else {}
    route(LOGITS, K, **good)
    with pytest.raises(error, match=message):
        route(**{"logits": LOGITS, "topk": K, **good, **arguments})


TENSORS = st.builds(
    torch.zeros,
    st.lists(st.sampled_from([0, 1, 2, T, 4, E]), max_size=3),
    dtype=st.sampled_from(
        [torch.float32, torch.bfloat16, torch.int32, torch.int64, torch.bool, torch.complex64]
    ),
)
ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 12), st.floats(), st.text(max_size=3),
    st.lists(st.integers(), max_size=2), TENSORS, st.builds(RoutingOutput, TENSORS, TENSORS),
    st.sampled_from([torch.int32, torch.int64, torch.float32]),
)  # fmt: skip
ARGUMENTS = (
    "logits", "topk", "per_expert_scale", "bias", "token_ids", "expert_table", "num_valid_tokens",
    "valid", "expert_map", "ids", "ids_dtype", "out",
)  # fmt: skip


@given(argument=st.sampled_from(ARGUMENTS), value=ANYTHING)
@example(argument="num_valid_tokens", value=torch.tensor([[1]]))
@example(argument="logits", value=torch.zeros(2))
@example(argument="logits", value=torch.zeros(2, 0, 4))
@settings(max_examples=300)
def test_whatever_comes_the_answer_is_right_or_a_type_or_value_error_naming_an_argument(
    argument, value
):
    route = Router(RoutingSpec(family="f", renormalize=True))
    given_arguments = {"logits": LOGITS, "topk": K, argument: value}
    refusal = None
    try:
        weights, ids = route(**given_arguments)
    except (TypeError, ValueError) as error:
        refusal = str(error)
    if refusal is None:
        operands = {
            name: given_arguments.get(name) for name in ("num_valid_tokens", "expert_map", "ids")
        }
        if given_arguments.get("valid") is not None:
            operands["num_valid_tokens"] = given_arguments["valid"]
        logits = given_arguments["logits"]
        rows = logits.flatten(0, -2) if logits.dim() > 1 else logits[None]
        expected = oracle.route(route.spec, rows, given_arguments["topk"], **operands)
        assert weights.shape == ids.shape == (*logits.shape[:-1], given_arguments["topk"])
        weights, ids = weights.view(expected.weights.shape), ids.view(expected.ids.shape)
        assert weights.dtype is torch.float32
        torch.testing.assert_close(weights.double(), expected.weights, rtol=2e-6, atol=1e-12)
        assert torch.equal(ids.long(), expected.ids)
        named = (
            value.ids.dtype
            if isinstance(value, RoutingOutput)
            else value
            if isinstance(value, torch.dtype)
            else None
        )
        assert ids.dtype is (named or torch.int32)
    else:
        message = re.match(r"(\w+): expected .+, got ", refusal, re.DOTALL)
        assert message, refusal
        assert message[1] in {argument, "topk"}


def operands_of_every_kind():
    """Return a spec with a call of it for each operand that is a tensor."""
    table = {"selection": "token_table"}
    biased = {"selection": "scores_plus_bias", "score": "sigmoid"}
    return {
        "logits": ({}, torch.zeros(T, E)),
        "per_expert_scale": ({"per_expert_scale": True}, torch.ones(E)),
        "bias": (biased, torch.ones(E)),
        "token_ids": (table, torch.zeros(T, dtype=torch.int64)),
        "expert_table": (table, torch.zeros(3, 2, dtype=torch.int64)),
        "num_valid_tokens": ({}, torch.ones(1, dtype=torch.int64)),
        "expert_map": ({}, torch.arange(E)),
        "out": ({}, torch.zeros(T, 2)),
    }


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", ["sparse", "mkldnn", "strided nested", "jagged nested"])
@pytest.mark.parametrize("argument", operands_of_every_kind())
@pytest.mark.parametrize("warm", [False, True], ids=["first call", "later call"])
def test_operands_of_other_layouts_are_refused_by_name(argument, layout, warm):
    every = operands_of_every_kind()
    fields, right = every[argument]
    if layout == "sparse":
        wrong = right.to_sparse()
    elif layout == "mkldnn":
        wrong = right.float().to_mkldnn()
    else:
        kind = torch.strided if layout.startswith("strided") else torch.jagged
        wrong = torch.nested.nested_tensor(
            list(right.reshape(1, -1)), layout=kind, dtype=right.dtype
        )
    call = {"logits": torch.zeros(T, E), "topk": 2}
    call |= {name: value for name, (needs, value) in every.items() if needs == fields and needs}
    call[argument] = (right, torch.zeros(T, 2, dtype=torch.int32)) if argument == "out" else right
    route = Router(RoutingSpec(family="f", **fields))
    if warm:
        route(**call)
    call[argument] = (wrong, torch.zeros(T, 2, dtype=torch.int32)) if argument == "out" else wrong
    with pytest.raises(ValueError, match=f"^{argument}: expected a dense tensor.*layout"):
        route(**call)


@pytest.mark.parametrize(
    "argument", [name for name in operands_of_every_kind() if name != "logits"]
)
@pytest.mark.parametrize("extras", [False, True], ids=["without extras", "with extras"])
def test_an_empty_tensor_is_no_missing_operand_in_a_later_call(argument, extras):
    plain = {"logits": torch.zeros(T, E), "topk": 2}
    if extras:
        plain["num_valid_tokens"] = torch.tensor([1])
    route = Router(RoutingSpec(family="f"))
    route(**plain)
    empty = torch.zeros(0)
    given = (empty, empty) if argument == "out" else empty
    with pytest.raises((TypeError, ValueError), match=f"^{argument}: expected .*, got "):
        route(**plain | {argument: given})


@pytest.mark.parametrize("number", [10**5000, -(10**5000)], ids=["huge", "negative"])
def test_a_number_of_any_size_is_refused_in_a_short_line(number):
    logits, route = torch.zeros(T, E), Router(RoutingSpec(family="f"))
    with pytest.raises(ValueError, match=r"^topk: expected .*, got ") as of_topk:
        route(logits, number)
    with pytest.raises(ValueError, match=r"^num_experts: expected .*, got ") as of_experts:
        route.resolve("cpu", torch.float32, number, 2)
    with pytest.raises(ValueError, match=r"^num_valid_tokens: expected .*, got ") as of_valid:
        route(logits, 2, num_valid_tokens=-abs(number))
    assert max(len(str(raised.value)) for raised in (of_topk, of_experts, of_valid)) < 100
    assert "num_experts: expected" in moe_routing.explain("mixtral", num_experts=number).error


def test_zeros_without_memory_are_no_outputs():
    out = torch._efficientzerotensor(T, 2), torch.zeros(T, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^out: expected tensors that can be written, got "):
        Router(RoutingSpec(family="f"))(torch.zeros(T, E), 2, out=out)


@pytest.mark.parametrize("argument", operands_of_every_kind())
@pytest.mark.parametrize("warm", [False, True], ids=["first call", "later call"])
def test_an_object_whose_attributes_raise_is_refused_by_name(argument, warm):
    class Lookup:
        def __getattr__(self, name):
            return {}[name]

    plain = {"logits": torch.zeros(T, E), "topk": 2, "num_valid_tokens": torch.tensor([1])}
    route = Router(RoutingSpec(family="f"))
    if warm:
        route(**plain)
    with pytest.raises((TypeError, ValueError), match=f"^{argument}: expected .*, got "):
        route(**plain | {argument: Lookup()})
