"""``moe_routing.permute`` and ``combine``: what the kit does not hold a backend to."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import moe_routing
from moe_routing.permutation import CombineProblem, PermutedRows, PermuteProblem

LAYOUTS = ({}, {"block": 4}, {"capacity": 2}, {"capacity": 3, "masked": True})
IDS = torch.tensor([[1, 0], [1, 2], [-1, 1], [2, 9]])


def planned(**options):
    return moe_routing.plan(IDS, 3, **options)


def has_place(plan):
    return (plan.inverse >= 0) & (plan.inverse < plan.offsets[-1])


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bool, torch.uint8, torch.int16, torch.int64, torch.float8_e4m3fn, torch.float16,
        torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128,
    ],
)  # fmt: skip
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_rows_of_any_dtype_are_moved_bit_for_bit(dtype, layout):
    most = 2 if dtype is torch.bool else 256  # other bytes are no bool
    hidden = torch.randint(0, most, (4, 32), dtype=torch.uint8).view(dtype)
    plan = planned(**layout)
    rows = moe_routing.permute(hidden, plan).flatten(0, -2).view(torch.uint8)
    for t, k in has_place(plan).nonzero().tolist():
        assert torch.equal(rows[plan.inverse[t, k]], hidden[t].view(torch.uint8))


@given(tokens=st.integers(0, 9), columns=st.integers(0, 5), layout=st.sampled_from(LAYOUTS))
def test_what_is_permuted_combines_to_each_token_times_its_weights(tokens, columns, layout):
    ids = torch.randint(-1, 4, (tokens, 2))
    plan = moe_routing.plan(ids, 3, **layout)
    hidden, weights = torch.randn(tokens, columns), torch.rand(tokens, 2)
    rows = moe_routing.permute(hidden, plan)
    assert rows.shape == (*plan.order.shape, columns)
    made = moe_routing.combine(rows, plan, weights)
    expected = hidden * (weights * has_place(plan)).sum(1, keepdim=True)
    torch.testing.assert_close(made, expected)


def test_scales_go_along_with_their_rows():
    plan = planned()
    hidden, scales = torch.randn(4, 256).to(torch.float8_e4m3fn), torch.rand(4, 2)
    moved = moe_routing.permute(hidden, plan, scales=scales)
    assert isinstance(moved, PermutedRows)
    assert torch.equal(moved.scales, moe_routing.permute(scales, plan))
    assert moved.rows.dtype is torch.float8_e4m3fn


@pytest.mark.parametrize("columns", [1, 127, 128, 129, 300])
def test_a_quantized_value_is_near_its_number_times_its_scale(columns):
    hidden = torch.randn(4, columns) * torch.tensor([1e-12, 1e-3, 1.0, 1e4])[:, None]
    plan = planned()
    rows, scales = moe_routing.permute(hidden, plan, quantize="float8_e4m3fn")
    assert scales.shape == (8, -(-columns // 128))
    assert scales.dtype is torch.float32
    values = rows.float() * scales.repeat_interleave(128, dim=1)[:, :columns]
    wanted = moe_routing.permute(hidden, plan)
    # A float8_e4m3fn has 4 significant bits, and its least is 2**-9.
    bound = wanted.abs() / 16 + scales.repeat_interleave(128, dim=1)[:, :columns] / 1024
    assert ((values - wanted).abs() <= bound).all()


def test_the_gradient_of_double_rows_is_computed_too():
    plan = planned(block=4)
    hidden = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda rows: moe_routing.permute(rows, plan), hidden)


@pytest.mark.parametrize("layout", [{}, {"block": 4}, {"capacity": 3, "masked": True}])
def test_rows_without_columns_go_there_and_back(layout):
    plan = planned(**layout)
    hidden = torch.zeros(4, 0, requires_grad=True)
    moe_routing.combine(moe_routing.permute(hidden, plan), plan).sum().backward()
    assert hidden.grad.shape == (4, 0)


def test_gradients_of_the_masked_layout_reach_used_rows_only():
    plan = planned(capacity=3, masked=True)
    rows = torch.randn(3, 3, 4, requires_grad=True)
    moe_routing.combine(rows, plan, torch.ones(4, 2)).sum().backward()
    used = torch.arange(3) < plan.counts[:, None]
    assert torch.equal(rows.grad, used[:, :, None].expand(3, 3, 4).float())


HIDDEN, ROWS, WEIGHTS = torch.randn(4, 6), torch.randn(8, 6), torch.rand(4, 2)
PLAN = planned()
WRONG = {
    "no tensor": (lambda: moe_routing.permute([[1.0]], PLAN), TypeError, "hidden"),
    "a vector": (lambda: moe_routing.permute(HIDDEN[0], PLAN), ValueError, "hidden"),
    "sparse rows": (lambda: moe_routing.permute(HIDDEN.to_sparse(), PLAN), ValueError, "hidden"),
    "no plan": (lambda: moe_routing.permute(HIDDEN, tuple(PLAN)), TypeError, "plan"),
    "another T": (lambda: moe_routing.permute(HIDDEN[:3], PLAN), ValueError, "hidden"),
    "int64 parts": (
        lambda: moe_routing.permute(HIDDEN, PLAN._replace(order=PLAN.order.long())),
        TypeError,
        "plan",
    ),
    "another K": (
        lambda: moe_routing.permute(HIDDEN, PLAN._replace(inverse=PLAN.inverse[:, :1])),
        ValueError,
        "plan",
    ),
    "another E": (
        lambda: moe_routing.permute(HIDDEN, PLAN._replace(offsets=PLAN.offsets[:-1])),
        ValueError,
        "plan",
    ),
    "another device": (lambda: moe_routing.permute(HIDDEN.to("meta"), PLAN), ValueError, "plan"),
    "no dtype for it": (
        lambda: moe_routing.permute(HIDDEN, PLAN, quantize="int8"),
        ValueError,
        "quantize",
    ),
    "int rows to fp8": (
        lambda: moe_routing.permute(HIDDEN.int(), PLAN, quantize="float8_e4m3fn"),
        TypeError,
        "hidden",
    ),
    "a gradient through fp8": (
        lambda: moe_routing.permute(
            HIDDEN.clone().requires_grad_(), PLAN, quantize="float8_e4m3fn"
        ),
        ValueError,
        "quantize",
    ),
    "scales of another T": (
        lambda: moe_routing.permute(HIDDEN, PLAN, scales=torch.ones(3, 1)),
        ValueError,
        "scales",
    ),
    "scales twice": (
        lambda: moe_routing.permute(
            HIDDEN, PLAN, scales=torch.ones(4, 1), quantize="float8_e4m3fn"
        ),
        ValueError,
        "scales",
    ),
    "double rows": (lambda: moe_routing.combine(ROWS.double(), PLAN), TypeError, "rows"),
    "another P": (lambda: moe_routing.combine(ROWS[:7], PLAN), ValueError, "rows"),
    "int weights": (lambda: moe_routing.combine(ROWS, PLAN, WEIGHTS.int()), TypeError, "weights"),
    "another shape of weights": (
        lambda: moe_routing.combine(ROWS, PLAN, WEIGHTS[:, :1]),
        ValueError,
        "weights",
    ),
    "a number as backend": (
        lambda: moe_routing.combine(ROWS, PLAN, backend=3),
        TypeError,
        "backend",
    ),
    "no backend": (
        lambda: moe_routing.permute(HIDDEN, PLAN, backend="nobody"),
        ValueError,
        "unknown backend",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("turn", ["first", "after a right call"])
def test_a_wrong_argument_is_named(wrong, turn):
    call, error, begins = WRONG[wrong]
    if turn != "first":
        moe_routing.combine(moe_routing.permute(HIDDEN, PLAN), PLAN, WEIGHTS)
    with pytest.raises(error, match=rf"^{begins}"):
        call()


def test_problems_take_only_what_the_operations_take():
    with pytest.raises(ValueError, match=r"^dtype"):
        PermuteProblem(topk=2, dtype="int8", quantize="float8_e4m3fn")
    with pytest.raises(ValueError, match=r"^topk"):
        PermuteProblem(topk=65, dtype="int8")
    with pytest.raises(ValueError, match=r"^weights"):
        CombineProblem(topk=2, dtype="float32", weights="int8")
    assert str(PermuteProblem(topk=2, dtype="int8", layout="masked")) == "permute K=2 int8 masked"


LOADS = """
import sys, torch, moe_routing
hidden, ids, weights, expected = torch.load(sys.argv[2])
made = torch.export.load(sys.argv[1]).module()(hidden, ids, weights)
assert torch.equal(made[0], expected[0]) and torch.equal(made[1].scales, expected[1].scales)
"""


class Layer(torch.nn.Module):
    def forward(self, hidden, ids, weights):
        plan = moe_routing.plan(ids, 3)
        quantized = moe_routing.permute(hidden, plan, quantize="float8_e4m3fn")
        rows = moe_routing.permute(hidden, plan) * 2
        return moe_routing.combine(rows, plan, weights), quantized


@pytest.mark.slow  # a new process that exports
def test_a_layer_is_exported_saved_and_loaded_in_a_new_process(tmp_path):
    arguments = (HIDDEN, IDS, WEIGHTS)
    program = torch.export.export(Layer(), arguments)
    torch.export.save(program, tmp_path / "layer.pt2")
    expected = Layer()(*arguments)
    torch.save((*arguments, tuple(expected)), tmp_path / "expected.pt")
    files = [str(tmp_path / "layer.pt2"), str(tmp_path / "expected.pt")]
    loads = LOADS.replace("torch.load(sys.argv[2])", "torch.load(sys.argv[2], weights_only=False)")
    subprocess.run([sys.executable, "-c", loads, *files], check=True)


def test_explain_says_who_moves_rows():
    assert moe_routing.explain(PermuteProblem(topk=2, dtype="int8")).winner == "eager"
    assert moe_routing.explain(CombineProblem(topk=2, dtype="float16")).winner == "eager"
