"""Integers that callers bring.

They may have any integer type and any size, in plain, compiled and exported calls.
"""

from __future__ import annotations

import enum
import re

import pytest
import torch

import moe_routing
from moe_routing import Router, RoutingSpec
from moe_routing._registry import registry
from moe_routing_registry import BackendSpec, Target

np = pytest.importorskip("numpy")

T, E, K = 5, 8, 2
LOGITS = torch.randn(T, E)
SPEC = RoutingSpec(family="f", renormalize=True)


class Three:
    """Something else that is an integer."""

    def __index__(self):
        return 3


SOME = {
    "int": 3,
    "np.int64": np.int64(3),
    "np.uint8": np.uint8(3),
    "array": np.array(3),
    "object": Three(),
}
ALL = {
    "T": T,
    "T + 1": T + 1,
    "2**31": 2**31,
    "2**63 - 1": 2**63 - 1,
    "2**63": 2**63,
    "2**70": 2**70,
    "uint64": np.uint64(2**63),
}
NO_INTEGERS = {
    "bool": True,
    "np.bool": np.bool_(1),
    "float": 3.0,
    "np.float64": np.float64(3),
    "text": "3",
    "list": [3],
}
BACKENDS = ["eager", pytest.param("torch-compile", marks=pytest.mark.slow)]


def rows(route, valid, logits=LOGITS):
    return (route(logits, K, num_valid_tokens=valid).ids >= 0).any(-1).sum().item()


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_integer_is_a_number_of_valid_tokens_and_more_than_t_are_all(backend):
    route = Router(SPEC, backend=backend)
    for valid in (*SOME.values(), *SOME.values(), 0, *ALL.values(), *ALL.values(), 3):
        assert rows(route, valid) == min(valid.__index__(), T)
    tensors = [torch.tensor(v, dtype=d) for v in (3, 2**31 - 1) for d in (torch.int32, torch.int64)]
    for valid in (
        *tensors,
        torch.tensor([2**63 - 1]),
        torch.tensor([0]),
        torch.tensor(-1),
        torch.tensor([-(2**63)]),
    ):
        assert rows(route, valid) == min(max(int(valid), 0), T)


@pytest.mark.parametrize("valid", [*NO_INTEGERS.values()], ids=NO_INTEGERS)
def test_what_is_no_integer_is_no_number_of_valid_tokens_in_later_calls_either(valid):
    route = Router(SPEC)
    for _ in range(2):
        with pytest.raises(
            TypeError, match=r"^num_valid_tokens: expected an int or an integer tensor, got "
        ):
            route(LOGITS, K, num_valid_tokens=valid)
        rows(route, 3)


@pytest.mark.parametrize(
    "before", [None, 3, np.int64(3), enum.IntEnum("Numbers", {"three": 3}).three, torch.tensor(3)]
)
@pytest.mark.parametrize("valid", [*NO_INTEGERS.values(), np.int64(-1)], ids=[*NO_INTEGERS, "-1"])
def test_a_call_that_brought_a_number_in_another_form_or_none_lets_nothing_through(valid, before):
    route = Router(SPEC)
    places = torch.arange(E)
    route(LOGITS, K, expert_map=places, num_valid_tokens=before)
    with pytest.raises((TypeError, ValueError), match=r"^num_valid_tokens: expected "):
        route(LOGITS, K, expert_map=places, num_valid_tokens=valid)


@pytest.mark.parametrize("valid", [-1, np.int8(-1), -(2**70)])
def test_a_negative_number_of_valid_tokens_is_refused_in_later_calls_too(valid):
    route = Router(SPEC)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=rf"^num_valid_tokens: expected a number >= 0, got {int(valid)}$"
        ):
            route(LOGITS, K, num_valid_tokens=valid)
        rows(route, 3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.bool, torch.float32])
def test_a_tensor_of_another_dtype_is_refused_and_its_dtype_named(dtype):
    with pytest.raises(
        ValueError,
        match=rf"^num_valid_tokens: expected an int, or an int32 or int64 tensor .*dtype {dtype}",
    ):
        Router(SPEC)(LOGITS, K, num_valid_tokens=torch.ones((), dtype=dtype))


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_compiled_function_takes_any_number_of_valid_tokens(dynamic):
    route = Router(SPEC)
    compiled = torch.compile(
        lambda x, n: route(x, K, num_valid_tokens=n).ids,
        fullgraph=True,
        backend="eager",
        dynamic=dynamic,
    )
    for valid in (3, 4, 0, 2**63, 2**70):
        assert (compiled(LOGITS, valid) >= 0).any(-1).sum() == min(valid, T)


COUNTED = []
"""What the kernel below was given as ``num_valid_tokens``."""


def build_counting(problem, device):
    """Make a third party's kernel that prepares calls.

    It never compares the number of valid tokens with the number of rows.
    """
    from moe_routing_backends.eager.route import EagerKernel, build

    class Counting(EagerKernel):
        def route(self, operands, **more):
            COUNTED.append(operands.num_valid_tokens)
            return super().route(operands, **more)

    kernel = build(problem, device)
    kernel.__class__ = Counting
    return kernel


@pytest.mark.parametrize("door", ["plain", "with gradients", "compiled", "vmap", "watched"])
def test_a_kernel_gets_a_number_of_valid_tokens_from_0_to_t(door):
    spec = BackendSpec(
        name="counting", factories={"route": f"{__name__}:build_counting"}, targets=(Target("cpu"),)
    )
    registry().register(spec)
    COUNTED.clear()
    try:
        route = Router(SPEC, backend="counting", verify=door == "watched")

        def call(logits, valid):
            return route(logits, K, num_valid_tokens=valid)

        for valid in (np.int64(3), 3, T, 2**70, 2**70, Three()):
            if door == "vmap":
                ids = torch.vmap(lambda x, n=valid: call(x, n).ids)(LOGITS[None])[0]
            elif door == "compiled":
                ids = torch.compile(call, fullgraph=True, backend="eager")(
                    LOGITS, valid.__index__()
                ).ids
            else:
                ids = call(LOGITS.clone().requires_grad_(door == "with gradients"), valid).ids
            assert (ids >= 0).any(-1).sum() == min(valid.__index__(), T)
        assert len(COUNTED) >= 6
        assert {int(valid) for valid in COUNTED} == {3, T}
        assert {type(valid) for valid in COUNTED} == {
            torch.Tensor if door in ("compiled", "vmap") else int
        }
    finally:
        registry().unregister(spec.name)


class Module(torch.nn.Module):
    def forward(self, logits, valid):
        return Router(SPEC)(logits, K, num_valid_tokens=valid)


@pytest.mark.parametrize("valid", [3, 2**63, 2**70, torch.tensor([3]), torch.tensor(2**62)])
def test_an_exported_program_takes_any_number_of_valid_tokens(valid):
    program = torch.export.export(Module(), (LOGITS, valid)).module()
    assert (program(LOGITS, valid).ids >= 0).any(-1).sum() == min(int(valid), T)


@pytest.mark.parametrize(
    "valid",
    [
        torch.ones(1, 1, dtype=torch.int64),
        torch.ones(2, dtype=torch.int64),
        torch.ones((), dtype=torch.int16),
    ],
)
def test_tensors_that_are_no_number_are_refused_where_functions_are_compiled_and_exported(valid):
    said = (
        r"num_valid_tokens: expected an int, "
        r"or an int32 or int64 tensor of shape \[\] or \[1\], got "
    )
    with pytest.raises(ValueError, match=said):
        torch.export.export(Module(), (LOGITS, valid))
    with pytest.raises(ValueError, match=said):
        torch.compile(Module(), backend="eager")(LOGITS, valid)


@pytest.mark.parametrize(
    "topk",
    [
        np.int64(2),
        np.uint8(2),
        np.array(2),
        enum.IntEnum("Numbers", {"two": 2}).two,
        type("Two", (), {"__index__": lambda _: 2})(),
    ],
)
def test_k_and_e_may_be_integers_of_any_type(topk):
    route, expected = Router(SPEC), Router(SPEC)(LOGITS, 2)
    for _ in range(2):
        assert torch.equal(route(LOGITS, topk).ids, expected.ids)
    assert torch.equal(Router(SPEC, topk=topk, num_experts=np.int64(E))(LOGITS).ids, expected.ids)
    assert route.resolve("cpu", torch.float32, np.int32(E), topk).problem.topk == 2
    assert route.warmup(np.int64(E), topk).winner == "eager"
    problem = moe_routing.explain(SPEC, num_experts=np.int64(E), topk=topk).problem
    assert (type(problem.num_experts), type(problem.topk), problem.topk) == (int, int, 2)


@pytest.mark.parametrize(
    "value", [*NO_INTEGERS.values(), torch.tensor(2)], ids=[*NO_INTEGERS, "tensor"]
)
def test_what_is_no_integer_is_no_k_and_no_e(value):
    route = Router(SPEC)
    for name, call in {
        "topk": lambda: route(LOGITS, value),
        "topk ": lambda: route.warmup(E, value),
        "topk  ": lambda: Router(SPEC, topk=value),
        "num_experts": lambda: route.warmup(value, 2),
        "num_experts ": lambda: Router(SPEC, num_experts=value),
    }.items():
        with pytest.raises(TypeError, match=rf"^{name.strip()}: expected an int, got "):
            call()
    for name in ("topk", "num_experts"):
        assert moe_routing.explain(SPEC, **{name: value}).error.startswith(
            f"TypeError: {name}: expected an int, got "
        )


def test_explain_reports_numbers_and_dtypes_that_cannot_be():
    assert (
        moe_routing.explain("mixtral", num_experts=0).error
        == "ValueError: num_experts: expected an int from 1 to 2**31 - 1, got 0"
    )
    assert moe_routing.explain("mixtral", num_experts=8, topk=0).error.startswith(
        "ValueError: topk: expected 1 <= topk"
    )
    assert moe_routing.explain("mixtral", dtype="float33").error.startswith(
        "ValueError: dtype: expected one of bfloat16, "
    )


@pytest.mark.parametrize(
    "value",
    [2**31, 10**5000, 0, -1, -(10**5000)],
    ids=["2**31", "10**5000", "0", "-1", "-10**5000"],
)
def test_e_is_at_most_what_an_id_can_hold(value):
    said = r"num_experts: expected an int from 1 to 2\*\*31 - 1, got "
    for ask in (
        lambda: Router(SPEC).warmup(value, 1),
        lambda: Router(SPEC).resolve("cpu", torch.float32, value, 1),
        lambda: Router(SPEC, num_experts=value),
    ):
        with pytest.raises(ValueError, match=f"^{said}"):
            ask()
    error = moe_routing.explain(SPEC, num_experts=value, topk=1).error
    assert re.match(f"ValueError: {said}", error)


def test_logits_have_no_more_columns_than_an_id_can_count():
    logits = torch.zeros(1, 1, device="meta").expand(1, 2**31)
    with pytest.raises(ValueError, match=r"^logits: expected at most 2\*\*31 - 1 columns, got a "):
        Router(SPEC)(logits, 1)
