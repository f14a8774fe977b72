"""The cases of vLLM's own tests of its routing kernels.

They are compared with a reference that is written here in plain torch.

vLLM's order: by descending score, of equal scores the lower id first. The reference works in
float64 on the widened logits, so it has no ties that the logits do not have.
"""

from __future__ import annotations

import pytest
import torch

from moe_routing import get_router
from moe_routing.families import FAMILIES

DTYPES = [torch.bfloat16, torch.half, torch.float32]
SCORES = {
    "softmax": lambda l: l.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda l: torch.nn.functional.softplus(l).sqrt(),
}


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def best(scores, count):
    """Ids of the best, by descending score, the lower id first."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def reference(logits, score, topk, *, bias=0.0, renormalize, scale=1.0):  # noqa: PLR0913 -- one argument a step
    scores = SCORES[score](logits.double())
    return weighed(scores, best(scores + bias, topk), renormalize=renormalize, scale=scale)


def grouped_reference(logits, score, topk, groups, kept, *, bias=None, renormalize, scale):  # noqa: PLR0913 -- one argument a step
    scores = SCORES[score](logits.double())
    chosen_by = (scores if bias is None else scores + bias).unflatten(1, (groups, -1))
    of_group = chosen_by.amax(-1) if bias is None else chosen_by.topk(2).values.sum(-1)
    shut = torch.ones_like(of_group, dtype=torch.bool).scatter(1, best(of_group, kept), value=False)
    ids = best(chosen_by.masked_fill(shut.unsqueeze(-1), -torch.inf).flatten(1), topk)
    return weighed(scores, ids, renormalize=renormalize, scale=scale)


def weighed(scores, ids, *, renormalize, scale):
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return (weights * scale).float(), ids.int()


def spec(family, **changes):
    return FAMILIES[family].spec.replace(**changes)


def assert_same(result, expected):
    assert torch.equal(result.ids, expected[1])
    torch.testing.assert_close(result.weights, expected[0], rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 2, 2048, pytest.param(250_000, marks=pytest.mark.slow)])
def test_gemma4(num_tokens, dtype):
    logits = random(num_tokens, 128, dtype=dtype)
    scale = torch.rand(128, generator=torch.Generator().manual_seed(1))
    ids = best(logits, 8)
    weights = logits.double().gather(1, ids).softmax(-1) * scale[ids]
    assert_same(get_router("gemma4")(logits, 8, scale), (weights.float(), ids.int()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_fused_top_k(score, renormalize, dtype):
    route = get_router(spec(f"{score}_topk", renormalize=renormalize))
    for num_tokens in (1, 33, 56):
        for num_experts in (6, 16):
            for topk in (3, 4):
                logits = random(num_tokens, num_experts, dtype=dtype)
                assert_same(
                    route(logits, topk), reference(logits, score, topk, renormalize=renormalize)
                )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_fused_top_k_with_a_bias(score, renormalize, dtype):
    route = get_router(spec(f"{score}_bias_topk", renormalize=renormalize))
    for num_tokens in (1, 33, 56):
        for num_experts in (6, 16):
            logits, bias = random(num_tokens, num_experts, dtype=dtype), random(num_experts, seed=1)
            assert_same(
                route(logits, 4, bias=bias),
                reference(logits, score, 4, bias=bias, renormalize=renormalize),
            )


GROUPS = [(16, 2, 8, 2), (128, 2, 8, 2), (256, 8, 8, 4), (384, 8, 1, 1), (512, 22, 1, 1)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("family", ["grouped_sigmoid_bias", "grouped_softmax"])
def test_grouped_top_k(family, score, renormalize, scale, dtype):
    for num_experts, topk, groups, kept in GROUPS:
        rule = {
            "score": score,
            "renormalize": renormalize,
            "scale": scale,
            "num_groups": groups,
            "topk_groups": kept,
        }
        route = get_router(spec(family, **rule))
        for num_tokens in (1, 33, 64):
            logits = random(num_tokens, num_experts, dtype=dtype)
            bias = random(num_experts, seed=1) if family == "grouped_sigmoid_bias" else None
            expected = grouped_reference(
                logits, score, topk, groups, kept, bias=bias, renormalize=renormalize, scale=scale
            )
            assert_same(route(logits, topk, bias=bias), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1.5])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("num_experts", [128, 256, 384, 512])
def test_softplus(num_experts, renormalize, scale, dtype):
    route = get_router(spec("sqrtsoftplus_bias", renormalize=renormalize, scale=scale))
    for num_tokens in (1, 33, 128):
        for topk in (6, 8, 16):
            logits, bias = random(num_tokens, num_experts, dtype=dtype), random(num_experts, seed=1)
            expected = reference(
                logits, "sqrtsoftplus", topk, bias=bias, renormalize=renormalize, scale=scale
            )
            assert_same(route(logits, topk, bias=bias), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_softplus_of_rows_that_are_not_finite_gives_the_first_experts_once_each(bad, dtype):
    logits = random(4, 256, dtype=dtype)
    logits[1:] = bad
    weights, ids = get_router("sqrtsoftplus_bias")(logits, 6, bias=torch.zeros(256))
    assert ids[1:].tolist() == [[0, 1, 2, 3, 4, 5]] * 3
    assert torch.isfinite(weights).all()
