"""The losses of ``moe_routing.balancing``: their formulas, gradients, masks, and memory."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import softplus

import moe_routing
from moe_routing.balancing import load_balancing_loss, sequence_balancing_loss, z_loss

SCORES = {
    "softmax": lambda x: x.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda x: softplus(x, threshold=1e9).sqrt(),
}
B, S, E, K = 3, 17, 6, 2


def drawn(*leading, dtype=torch.float64, experts=E, topk=K):
    logits = torch.randn(*leading, experts, dtype=torch.float64) * 2
    return logits.to(dtype), logits.argsort(-1, descending=True)[..., :topk]


def balance(logits, ids, score, valid=None):
    """``E * sum(f * P)`` token by token, in float64."""
    experts, counts, tokens = logits.shape[-1], [0] * logits.shape[-1], 0
    mean = torch.zeros(experts, dtype=torch.float64)
    for row, picked, counted in zip(
        logits.reshape(-1, experts).double(),
        ids.reshape(-1, ids.shape[-1]).tolist(),
        [True] * ids[..., 0].numel() if valid is None else valid.flatten().tolist(),
        strict=True,
    ):
        if counted:
            scores = SCORES[score](row)
            mean, tokens = mean + scores / scores.sum(), tokens + 1
            for i in picked:
                if 0 <= i < experts:
                    counts[i] += 1
    shares = torch.tensor(counts, dtype=torch.float64) / max(1, sum(counts))
    return experts * (shares * mean).sum() / max(1, tokens)


def gradient(loss, logits):
    leaf = logits.detach().clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(leaf), leaf)
    assert found.dtype is logits.dtype
    return found.double()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("leading", [(S,), (B, S), (), (0,)], ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_the_loss_is_the_formula_token_by_token(score, leading, masked):
    logits, ids = drawn(*leading)
    valid = torch.rand(leading) < 0.7 if masked else None
    if masked:
        valid.view(-1)[:1] = True
    given = {"score": score, "valid": valid}
    found, exact = load_balancing_loss(logits, ids, **given), balance(logits, ids, **given)
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=0.0)
    if logits.numel():
        torch.testing.assert_close(
            gradient(lambda x: load_balancing_loss(x, ids, **given), logits),
            gradient(lambda x: balance(x, ids, **given), logits),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("score", SCORES)
def test_shorter_dtypes_are_summed_in_float32(score, dtype):
    logits, ids = drawn(B, S, dtype=dtype)
    found = load_balancing_loss(logits, ids, score=score)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), balance(logits, ids, score), rtol=1e-6, atol=0.0)
    exact = gradient(lambda x: balance(x, ids, score), logits.double())
    within = {"rtol": torch.finfo(dtype).eps, "atol": 1e-7}
    found = gradient(lambda x: load_balancing_loss(x, ids, score=score), logits)
    torch.testing.assert_close(found, exact, **within)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("score", SCORES)
def test_the_loss_of_sequences_is_the_mean_of_each_ones(score, masked):
    logits, ids = drawn(B, S)
    valid = torch.rand(B, S) < 0.5 if masked else None
    if masked:
        valid[1] = False
    found = sequence_balancing_loss(logits, ids, score=score, valid=valid)
    each = [
        balance(logits[b], ids[b], score, None if valid is None else valid[b]) for b in range(B)
    ]
    torch.testing.assert_close(found, torch.stack(each).mean(), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("masked", [False, True])
def test_the_z_loss_is_the_mean_square_of_the_logarithm_of_the_sum(masked):
    logits, _ = drawn(B, S)
    valid = torch.rand(B, S) < 0.7 if masked else None

    def exact(x):
        rows = x.flatten(0, 1) if valid is None else x[valid]
        return torch.log(rows.exp().sum(-1)).square().mean()

    torch.testing.assert_close(z_loss(logits, valid=valid), exact(logits))
    torch.testing.assert_close(
        gradient(lambda x: z_loss(x, valid=valid), logits), gradient(exact, logits)
    )


@pytest.mark.parametrize(
    "loss",
    [
        *(lambda x, ids, score=s: load_balancing_loss(x, ids, score=score) for s in SCORES),
        lambda x, ids: sequence_balancing_loss(x, ids, score="sigmoid"),
        lambda x, _: z_loss(x),
    ],
    ids=[*SCORES, "sequences", "z"],
)
def test_gradients_of_the_first_and_second_order(loss):
    logits, ids = drawn(2, 3)
    leaf = logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, ids), leaf)
    assert torch.autograd.gradgradcheck(lambda x: loss(x, ids), leaf)


@given(scale=st.sampled_from([1e-3, 1.0, 50.0, 3e4, 1e30]), score=st.sampled_from([*SCORES]))
def test_finite_logits_of_any_size_give_a_finite_loss_between_its_bounds(scale, score):
    logits = torch.randn(S, E) * scale
    ids = moe_routing.get_router("topk_softmax")(logits, K).ids
    leaf = logits.requires_grad_()
    loss = load_balancing_loss(leaf, ids, score=score)
    loss.backward()
    assert 0.0 <= loss <= E * (1 + 1e-6)
    assert leaf.grad.isfinite().all()


def test_what_is_masked_may_hold_anything():
    logits, ids = drawn(4, dtype=torch.float32)
    logits[1], ids[1] = torch.nan, 2**40
    valid = torch.tensor([True, False, True, True])
    kept = valid.nonzero().flatten()
    for loss in (
        lambda x, i, v: load_balancing_loss(x, i, valid=v),
        lambda x, i, v: sequence_balancing_loss(
            x[None], i[None], valid=None if v is None else v[None]
        ),
        lambda x, _, v: z_loss(x, valid=v),
    ):
        leaf = logits.clone().requires_grad_()
        found = loss(leaf, ids, valid)
        torch.testing.assert_close(found, loss(logits[kept], ids[kept], None))
        found.backward()
        assert leaf.grad.isfinite().all()
        assert not leaf.grad[1].any()


def test_one_expert_for_all_costs_e_times_its_score_and_equal_shares_cost_one():
    logits = torch.full((E, E), -30.0).fill_diagonal_(30.0)
    everyone = torch.arange(E)[:, None]
    assert load_balancing_loss(logits, everyone) == 1.0
    first = logits[:1].expand(E, E)
    assert load_balancing_loss(first, torch.zeros(E, 1, dtype=torch.int32)) == E


@pytest.mark.parametrize(
    "loss", [load_balancing_loss, lambda x, _: z_loss(x)], ids=["balance", "z"]
)
def test_only_the_logits_are_kept_for_the_way_back(loss):
    kept = []
    logits, ids = drawn(S, dtype=torch.bfloat16)
    leaf = logits.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss(leaf, ids)
    large = [t for t in kept if t.numel() >= S * E]
    assert [(t.data_ptr(), t.dtype) for t in large] == [(leaf.data_ptr(), torch.bfloat16)]


@pytest.mark.slow
def test_a_compiled_loss_is_one_graph():
    @torch.compile(fullgraph=True)
    def both(x, ids, valid):
        return load_balancing_loss(x, ids, score="sigmoid", valid=valid) + z_loss(x, valid=valid)

    logits, ids = drawn(S, dtype=torch.float32)
    valid = torch.arange(S) < 11
    leaf = logits.clone().requires_grad_()
    found = both(leaf, ids, valid)
    exact = load_balancing_loss(logits, ids, score="sigmoid", valid=valid)
    torch.testing.assert_close(found, exact + z_loss(logits, valid=valid))
    found.backward()
    torch.testing.assert_close(
        leaf.grad,
        gradient(
            lambda x: (
                load_balancing_loss(x, ids, score="sigmoid", valid=valid) + z_loss(x, valid=valid)
            ),
            logits,
        ).float(),
    )


@pytest.mark.parametrize(
    ("changed", "error", "said"),
    [
        ({"logits": [1.0]}, TypeError, "logits: expected a tensor of dtype"),
        ({"logits": torch.zeros(4, E, dtype=torch.int64)}, TypeError, "logits: expected a tensor"),
        ({"logits": torch.zeros(())}, ValueError, "logits: expected a dense tensor of rank 1"),
        ({"logits": torch.zeros(4, 0)}, ValueError, "logits: expected .* 1 column or more"),
        ({"ids": torch.zeros(4, K)}, TypeError, "ids: expected a tensor of dtype torch.int32"),
        (
            {"ids": torch.zeros(5, K, dtype=torch.int32)},
            ValueError,
            r"ids: expected the shape \[4,",
        ),
        (
            {"ids": torch.zeros(4, K, dtype=torch.int64, device="meta")},
            ValueError,
            "ids: expected a",
        ),
        ({"score": "relu"}, ValueError, "score: expected one of 'softmax', 'sigmoid'"),
        ({"score": None}, TypeError, "score: expected one of"),
        ({"score": np.array(["softmax", "relu"])}, TypeError, "score: expected one of"),
        ({"group": 3}, TypeError, "group: expected a torch.distributed.ProcessGroup, or None"),
        ({"valid": torch.ones(4)}, TypeError, "valid: expected a tensor of dtype torch.bool"),
        (
            {"valid": torch.ones(3, dtype=torch.bool)},
            ValueError,
            r"valid: expected the shape \[4\]",
        ),
    ],
)
def test_bad_arguments_are_named(changed, error, said):
    arguments = {
        "logits": torch.zeros(4, E),
        "ids": torch.zeros(4, K, dtype=torch.int64),
        **changed,
    }
    with pytest.raises(error, match=f"^{said}.*got "):
        load_balancing_loss(**arguments)


def test_a_layout_that_is_not_dense_is_named():
    logits, ids = drawn(4)
    with pytest.raises(ValueError, match=r"^logits: expected a dense.*, layout torch.sparse_coo$"):
        load_balancing_loss(logits.to_sparse(), ids)


def test_sequences_have_three_dimensions():
    logits, ids = drawn(S)
    with pytest.raises(ValueError, match=r"^logits: expected a tensor \[B, S, E\], got "):
        sequence_balancing_loss(logits, ids)
