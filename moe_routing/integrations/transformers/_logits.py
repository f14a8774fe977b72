"""The logits of each kind of router, computed from the router's input.

The parameters, dtypes and submodules are the router's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 -- its usual name

Router = Any
"""A router module of transformers; what it holds depends on its class."""


def flat(hidden: Tensor) -> Tensor:
    return hidden.reshape(-1, hidden.shape[-1])


def linear(router: Router, hidden: Tensor) -> Tensor:
    return F.linear(flat(hidden), router.weight)


def linear_with_bias(router: Router, hidden: Tensor) -> Tensor:
    return F.linear(flat(hidden), router.weight, router.bias)


def linear_float32(router: Router, hidden: Tensor) -> Tensor:
    return F.linear(flat(hidden).float(), router.weight.float())


def linear_float32_with_bias(router: Router, hidden: Tensor) -> Tensor:
    return F.linear(flat(hidden).float(), router.weight.float(), router.bias.float())


def linear_float32_input(router: Router, hidden: Tensor) -> Tensor:
    return F.linear(flat(hidden).float(), router.weight)


def linear_in_weights_dtype(router: Router, hidden: Tensor) -> Tensor:
    return F.linear(flat(hidden).to(router.weight.dtype), router.weight)


def linear_without_autocast(router: Router, hidden: Tensor) -> Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        return linear_float32(router, hidden)


def linear_then_float32(router: Router, hidden: Tensor) -> Tensor:
    return F.linear(flat(hidden), router.weight).float()


def as_given(_router: Router, logits: Tensor) -> Tensor:
    return logits


def afmoe(router: Router, hidden: Tensor) -> Tensor:
    logits: Tensor = router.gate(flat(hidden))
    return logits.float()


def gemma(router: Router, hidden: Tensor) -> Tensor:
    logits: Tensor = router.proj(router.norm(hidden) * router.scale * router.scalar_root_size)
    return logits


def hunyuan(router: Router, hidden: Tensor) -> Tensor:
    hidden = flat(hidden)
    logits: Tensor = router.wg(
        hidden.float() if router.wg.weight.dtype == torch.float32 else hidden
    )
    return logits


def jetmoe(router: Router, hidden: Tensor) -> Tensor:
    logits: Tensor = router.layer(hidden)
    return logits.float()


def kolibri(router: Router, hidden: Tensor) -> Tensor:
    hidden = flat(hidden)
    if hidden.is_cuda and hidden.dtype == router.weight.dtype and not torch.is_grad_enabled():
        return torch.mm(hidden, router.weight.t(), out_dtype=torch.float32)
    return F.linear(hidden.float(), router.weight.float())


def laguna(router: Router, hidden: Tensor) -> Tensor:
    logits, cap = linear_then_float32(router, hidden), router.router_logit_softcapping
    return torch.tanh(logits / cap) * cap if cap > 0.0 else logits


def longcat(router: Router, hidden: Tensor) -> Tensor:
    return F.linear(flat(hidden).float(), router.classifier.weight.float())


def muse_spark(router: Router, hidden: Tensor) -> Tensor:
    multiplier: float = router.output_multiplier
    return linear_float32(router, hidden) * multiplier
