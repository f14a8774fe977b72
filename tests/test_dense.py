"""``moe_routing.dense``: a routing with a column for each expert."""

import pytest
import torch

import moe_routing
from moe_routing import dense

E, K = 6, 2


def routed(*leading, family="topk_softmax", **operands):
    return moe_routing.get_router(family)(torch.randn(*leading, E), K, **operands)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("leading", [(), (5,), (0,), (2, 3)], ids=str)
def test_a_column_has_the_weight_of_its_expert(leading, ids_dtype):
    weights, ids = routed(*leading, ids_dtype=ids_dtype)
    probs, routing_map = dense(weights, ids, E)
    assert probs.shape == routing_map.shape == (*leading, E)
    assert (probs.dtype, routing_map.dtype) == (torch.float32, torch.bool)
    assert probs.is_contiguous()
    assert routing_map.is_contiguous()
    assert torch.equal(probs.gather(-1, ids.long()), weights)
    assert torch.equal(routing_map.sum(-1), torch.full(leading, K))
    assert not probs[~routing_map].any()


def test_padding_and_other_ranks_experts_add_nothing_whatever_their_weights():
    weights = torch.tensor([[0.5, torch.nan], [torch.inf, 0.25], [torch.nan, torch.inf]])
    ids = torch.tensor([[0, -1], [E, 0], [-(2**31), 2**31 - 1]], dtype=torch.int32)
    probs, routing_map = dense(weights, ids, E)
    assert probs.tolist() == [[0.5] + [0.0] * 5, [0.25] + [0.0] * 5, [0.0] * 6]
    assert routing_map.tolist() == [[True] + [False] * 5] * 2 + [[False] * 6]


def test_rows_past_the_valid_tokens_are_blank():
    probs, routing_map = dense(*routed(4, num_valid_tokens=1), E)
    assert routing_map.sum(-1).tolist() == [K, 0, 0, 0]
    assert not probs[1:].any()


def test_a_selected_expert_of_weight_zero_is_in_the_map():
    probs, routing_map = dense(torch.zeros(1, 1), torch.tensor([[3]]), E)
    assert routing_map[0].tolist() == [False, False, False, True, False, False]
    assert not probs.any()


def test_weights_of_equal_ids_add_up():
    probs, routing_map = dense(torch.tensor([[0.5, 0.25]]), torch.tensor([[2, 2]]), E)
    assert probs[0].tolist() == [0.0, 0.0, 0.75, 0.0, 0.0, 0.0]
    assert routing_map.sum() == 1


def test_gradients_flow_to_the_weights_that_stand_in_it():
    weights = torch.rand(3, K, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0, 1], [5, -1], [-1, -1]])
    upstream = torch.rand(3, E, dtype=torch.float64)
    dense(weights, ids, E).probs.backward(upstream)
    assert torch.equal(weights.grad[0], upstream[0, :2])
    assert weights.grad[1].tolist() == [float(upstream[1, 5]), 0.0]
    assert weights.grad[2].tolist() == [0.0, 0.0]
    weights.grad = None
    assert torch.autograd.gradgradcheck(lambda w: dense(w.square(), ids, E).probs, weights)


def test_weights_keep_their_dtype():
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert dense(torch.ones(2, K, dtype=dtype), torch.tensor([[0, 1]] * 2), E).probs.dtype is (
            dtype
        )


def test_it_compiles_and_maps():
    weights, ids = routed(2, 3)
    compiled = torch.compile(dense, fullgraph=True, backend="aot_eager")
    mapped = torch.vmap(lambda w, i: tuple(dense(w, i, E)))(weights, ids)
    for output in (compiled(weights, ids, E), mapped):
        for got, expected in zip(output, dense(weights, ids, E), strict=True):
            assert torch.equal(got, expected)


WEIGHTS, IDS = torch.ones(2, K), torch.zeros(2, K, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (([[1.0]], IDS, E), TypeError, r"weights: expected a tensor \[..., K\], got a list"),
        ((WEIGHTS.long(), IDS, E), TypeError, "weights: expected dtype torch.bfloat16 or "),
        ((WEIGHTS[0, 0], IDS, E), ValueError, "weights: expected a dense tensor"),
        ((WEIGHTS.to_sparse(), IDS, E), ValueError, "weights: expected a dense tensor"),
        ((WEIGHTS, [[0]], E), TypeError, r"ids: expected a tensor \[..., K\], got a list"),
        ((WEIGHTS, IDS.float(), E), TypeError, "ids: expected dtype torch.int32 or torch.int64"),
        ((WEIGHTS, IDS[:1], E), ValueError, r"ids: expected the weights' shape \[2, 2\]"),
        ((WEIGHTS, IDS.to("meta"), E), ValueError, "ids: expected the weights' device cpu"),
        ((WEIGHTS, IDS, 0), ValueError, "num_experts: expected an int from 1 to "),
        ((WEIGHTS, IDS, 2.0), TypeError, "num_experts: expected an int, got 2.0"),
    ],
)
def test_a_wrong_argument_is_named(arguments, error, said):
    with pytest.raises(error, match=f"^{said}"):
        dense(*arguments)
