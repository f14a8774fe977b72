"""Train torchtitan's own tiny DeepSeek-V3 for ten steps, routed by itself and by us.

The script prints both runs as JSON.

``python train_torchtitan.py`` with torchtitan 0.3.0 and ``torchtitan_adapter`` on the path. The
model is torchtitan's ``debugmodel``, three of its six layers: one dense, one that selects by
softmax, as it comes, and one that selects by sigmoid in groups, as its 671B configuration does. Its
balancing hook moves the biases, and its ``apply_compile`` compiles each layer.

Its attention is ``flex_attention``, which refuses gradients on a CPU ("FlexAttention does not
support backward on CPU"). So each layer gets the other attention of the same package,
``ScaledDotProductAttention``, which its Flux model has; it is causal over the whole row.
"""

from __future__ import annotations

import json
import sys

import torch
import torchtitan_adapter
from torchtitan.components.optimizer import register_moe_load_balancing_hook
from torchtitan.config import CompileConfig
from torchtitan.distributed.compile import apply_compile
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.deepseek_v3 import deepseekv3_configs

STEPS = 10
ALONE = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, world_size=1)


def build():
    config, largest = (
        deepseekv3_configs[name](attn_backend="flex", moe_comm_backend="standard")
        for name in ("debugmodel", "671B")
    )
    del config.layers[3:]
    for layer in config.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    router, published = config.layers[2].moe.router, largest.layers[-1].moe.router
    for name in ("score_func", "route_norm", "route_scale"):
        setattr(router, name, getattr(published, name))
    router.num_expert_groups, router.num_limited_groups = (
        4,
        2,
    )  # of 8 experts; the published one has 8 and 4, of 256
    torch.manual_seed(0)
    model = config.build()
    model.init_states()
    return model


def train(*, ours, compiled):
    """Return the losses, and the biases after the last step."""
    model = build()
    if ours:
        assert torchtitan_adapter.adapt(model) == 2
    if compiled:
        torch.compiler.reset()
        apply_compile(model, compile_config=CompileConfig(), parallel_dims=ALONE)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    register_moe_load_balancing_hook(optimizer, [model], ALONE)
    tokens = torch.randint(0, 2048, (2, 65), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(STEPS):
        logits = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    blocks = [block.moe for block in model.layers.values() if block.moe_enabled]
    return {"losses": losses, "biases": [moe.expert_bias_E.tolist() for moe in blocks]}


if __name__ == "__main__":
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )  # the hook asks
    runs = {
        mode: {
            who: train(ours=who == "ours", compiled=mode == "compiled")
            for who in ("ours", "theirs")
        }
        for mode in ("eager", "compiled")
    }
    sys.stdout.write(json.dumps(runs))
