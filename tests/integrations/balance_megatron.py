"""Balance by the installed megatron-core's functions on a CPU, and by ours.

``compared()`` returns how far losses and their gradients are apart, and whether biases are equal.
``route_megatron.py`` prints it.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import (
    compute_routing_scores_for_aux_loss,
    get_updated_expert_bias,
    switch_load_balancing_loss_func,
    z_loss_func,
)

from moe_routing import balancing

B, S, E, K = 4, 33, 16, 4


def their_balance(logits, score):
    """Return the loss of a batch ``[T, E]``, as their router's ``aux_loss`` computes it."""
    routing_map, scores = compute_routing_scores_for_aux_loss(logits, K, score)
    return switch_load_balancing_loss_func(scores, routing_map.sum(0), len(logits), K, E, 1.0)


def losses(score):
    """Return pairs of a loss of ours and theirs, as functions of logits ``[B, S, E]``."""

    def ids(logits):
        return logits.detach().topk(K).indices

    return {
        f"{score}, one batch": (
            lambda x: balancing.load_balancing_loss(x, ids(x), score=score),
            lambda x: their_balance(x.flatten(0, 1), score),
        ),
        f"{score}, sequences": (
            lambda x: balancing.sequence_balancing_loss(x, ids(x), score=score),
            lambda x: torch.stack([their_balance(sequence, score) for sequence in x]).mean(),
        ),
    }


def apart(ours, theirs, logits):
    """Return the largest relative difference of two losses and of their gradients."""
    found = []
    for loss in (ours, theirs):
        leaf = logits.clone().requires_grad_()
        value = loss(leaf)
        value.backward()
        found.append((value.detach(), leaf.grad))
    return max(
        float((our - their).abs().max() / their.abs().max())
        for our, their in zip(*found, strict=True)
    )


def compared():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(B, S, E, generator=generator) * 2
    pairs = losses("softmax") | losses("sigmoid")
    pairs["z"] = (balancing.z_loss, lambda x: z_loss_func(x.flatten(0, 1), 1.0))
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    counts = torch.randint(0, 9, (3, E), generator=generator)
    bias = torch.randn(3, E, generator=generator)
    theirs = get_updated_expert_bias(counts.float(), bias, 1e-3)
    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    balancing.update_bias(bias, counts, 1e-3, group=group)
    torch.distributed.destroy_process_group()
    return {
        "apart": {name: apart(*pair, logits) for name, pair in pairs.items()},
        "biases are equal": torch.equal(bias, theirs),
    }
