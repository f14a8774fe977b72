"""``update_bias``: DeepSeek-V3's step, in place, seen by routers that have been called before."""

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
    for _ in range(60):
        ids = route(logits, K, bias=bias).ids
        counts = ids.flatten().bincount(minlength=E)
        spread.append(int(counts.max() - counts.min()))
        update_bias(bias, counts, 0.02)
    assert spread[0] > 250
    assert max(spread[-5:]) < 60


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
    ],
)
def test_bad_arguments_are_named(changed, error, said):
    arguments = {
        "bias": torch.zeros(E), "counts": torch.ones(E, dtype=torch.int64), "rate": 0.1, **changed,
    }  # fmt: skip
    with pytest.raises(error, match=f"^{said}.*got "):
        update_bias(**arguments)
