"""``update_bias``: DeepSeek-V3's step, in place, seen by routers that have been called before."""

import fractions

import numpy as np
import pytest
import torch

import moe_routing
from moe_routing.balancing import update_bias

E, K = 8, 2


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_who_got_less_than_the_mean_gets_a_step_more(leading, dtype):
    bias, counts = torch.randn(*leading, E), torch.randint(0, 20, (*leading, E), dtype=dtype)
    before, given = bias.clone(), counts.clone()
    update_bias(bias, counts, 0.25)
    mean = counts.double().mean(-1, keepdim=True)
    assert torch.equal(bias, before + 0.25 * (mean - counts).sign().float())
    assert torch.equal(counts, given)


def test_equal_loads_change_nothing_however_large_they_are():
    bias = torch.randn(3)
    before = bias.clone()
    update_bias(bias, torch.full((3,), 2**31 - 1, dtype=torch.int32), 0.5)
    assert torch.equal(bias, before)


@pytest.mark.parametrize("counts", [[2**62, 2**62, 2**62, 0], [2**63 - 1, 2**63 - 2, 0, 5]])
def test_counts_whose_sum_is_too_large_for_int64_are_compared_exactly(counts):
    bias = torch.zeros(4)
    update_bias(bias, torch.tensor(counts), 0.5)
    mean = fractions.Fraction(sum(counts), 4)
    assert bias.tolist() == [0.5 * ((mean > count) - (mean < count)) for count in counts]


def test_rates_of_numpy_are_numbers():
    for rate in (np.float32(0.5), np.float64(0.5), fractions.Fraction(1, 2)):
        bias = torch.zeros(2)
        update_bias(bias, torch.tensor([3, 1]), rate)
        assert bias.tolist() == [-0.5, 0.5]


def test_a_bias_of_inference_mode_is_refused_outside_of_it():
    counts = torch.tensor([3, 1])
    with torch.inference_mode():
        bias = torch.zeros(2)
        update_bias(bias, counts, 0.5)
    with pytest.raises(ValueError, match=r"^bias: expected a tensor that can be written .*, got "):
        update_bias(bias, counts, 0.5)
    assert bias.tolist() == [-0.5, 0.5]


def test_a_compiled_update_is_one_graph_for_all_sizes():
    compiled = torch.compile(update_bias, fullgraph=True, dynamic=True, backend="eager")
    for experts, rate in ((4, 0.25), (7, 0.5), (1, 1)):
        bias, counts = torch.zeros(experts), torch.randint(9, (experts,))
        expected = bias.clone()
        update_bias(expected, counts, rate)
        compiled(bias, counts, rate)
        assert torch.equal(bias, expected)


def test_a_parameter_is_updated_without_a_gradient():
    bias = torch.nn.Parameter(torch.zeros(2))
    update_bias(bias, torch.tensor([3, 1]), 0.5)
    assert bias.tolist() == [-0.5, 0.5]
    assert bias.grad is None
    assert bias.grad_fn is None


@pytest.mark.parametrize(
    "backend", ["eager", pytest.param("torch-compile", marks=pytest.mark.slow)]
)
def test_steps_flatten_the_loads_of_a_router_that_keeps_its_kernel(backend):
    route = moe_routing.get_router("sigmoid_bias_topk", backend=backend)
    logits = torch.randn(512, E) + torch.linspace(-2, 2, E)
    bias, spread = torch.zeros(E), []
    for step in range(60):
        ids = route(logits, K, bias=bias).ids
        counts = ids.flatten().bincount(minlength=E)
        spread.append(int(counts.max() - counts.min()))
        # At a constant rate the loads swing for ever, as far as the draw has rows near a tie.
        update_bias(bias, counts, 0.1 * 0.9**step)
    assert spread[0] > 250  # 386 at the least in 400 draws
    assert max(spread[-5:]) < 60  # 7 at the most


@pytest.mark.parametrize(
    ("changed", "error", "said"),
    [
        ({"bias": [0.0]}, TypeError, "bias: expected a tensor of dtype torch.float32"),
        ({"bias": torch.zeros(E).bfloat16()}, TypeError, "bias: expected a tensor of dtype"),
        ({"counts": torch.zeros(E)}, TypeError, "counts: expected a tensor of dtype torch.int32"),
        (
            {"counts": torch.zeros(E + 1, dtype=torch.int64)},
            ValueError,
            r"counts: expected the sha",
        ),
        ({"rate": "0.1"}, TypeError, "rate: expected a number"),
        ({"rate": -0.1}, ValueError, "rate: expected a finite number of 0 or more"),
        ({"rate": float("inf")}, ValueError, "rate: expected a finite number"),
        ({"rate": 10**400}, ValueError, "rate: expected a finite number"),
        ({"rate": 1e300}, ValueError, "rate: expected a finite number of 0 or more, at most 3.4"),
        ({"rate": True}, TypeError, "rate: expected a number"),
        ({"bias": torch.zeros(1).expand(E)}, ValueError, "bias: expected a tensor whose elements"),
        ({"group": "world"}, TypeError, "group: expected a torch.distributed.ProcessGroup"),
        (
            {"counts": torch.ones(E, dtype=torch.int64).to_sparse()},
            ValueError,
            "counts: expected a dense tensor",
        ),
    ],
)
def test_bad_arguments_are_named(changed, error, said):
    arguments = {
        "bias": torch.zeros(E), "counts": torch.ones(E, dtype=torch.int64), "rate": 0.1, **changed,
    }  # fmt: skip
    with pytest.raises(error, match=f"^{said}.*got "):
        update_bias(**arguments)


def test_what_overlaps_is_told_by_strides():
    counts = torch.tensor([[3, 0, 0], [0, 0, 3]])
    apart = torch.zeros(3, 2, 2)[..., 0].T
    update_bias(apart, counts, 0.5)
    assert torch.equal(apart, torch.tensor([[-0.5, 0.5, 0.5], [0.5, 0.5, -0.5]]))
    with pytest.raises(ValueError, match=r"^bias: .*, got .*, strides \[1, 1\]"):
        update_bias(torch.zeros(4).as_strided((2, 3), (1, 1)), counts, 0.5)
