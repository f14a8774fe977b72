"""Losses compared with transformers' ``load_balancing_loss_func``."""

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import moe_routing
from moe_routing.balancing import load_balancing_loss

LAYERS, B, S, E, K = 3, 2, 15, 8, 2


@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_of_all_layers_tokens_times_k_is_transformers(masked):
    logits = torch.randn(LAYERS, B * S, E)
    mask = torch.rand(B, S) < 0.7 if masked else None
    ids = moe_routing.get_router("mixtral")(logits, K).ids
    valid = None if mask is None else mask.flatten().expand(LAYERS, -1)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    found = load_balancing_loss(ours, ids, valid=valid) * K
    expected = load_balancing_loss_func(
        tuple(theirs.unbind()), E, K, None if mask is None else mask.long()
    )
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
