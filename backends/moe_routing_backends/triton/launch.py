"""The host side: choose the variant for T, and launch it with as little as Triton allows."""

from __future__ import annotations

import torch

from moe_routing import RoutingOutput
from moe_routing_backends.triton.lanes import lanes_kernel
from moe_routing_backends.triton.plan import constants


class TritonRouter:
    def __init__(self, problem, device):
        self.problem = problem
        self.ids_dtype = getattr(torch, problem.ids_dtype)
        self.columns = problem.topk + problem.spec.shared_experts
        self.constants = constants(problem)

    def __call__(
        self,
        logits,
        *,
        per_expert_scale=None,
        bias=None,
        token_ids=None,
        expert_table=None,
        num_valid_tokens=None,
        expert_map=None,
        out=None,
    ):
        T, E = logits.shape
        if out is None:
            out = RoutingOutput(
                torch.empty(T, self.columns, dtype=torch.float32, device=logits.device),
                torch.empty(T, self.columns, dtype=self.ids_dtype, device=logits.device),
            )
        on_device = isinstance(num_valid_tokens, torch.Tensor)
        valid = T if num_valid_tokens is None or on_device else min(num_valid_tokens, T)
        rs, es = logits.stride()
        bt = 4
        lanes_kernel[((T + bt - 1) // bt,)](
            logits,
            out.weights,
            out.ids,
            per_expert_scale,
            bias,
            token_ids,
            expert_table,
            num_valid_tokens if on_device else None,
            expert_map,
            T,
            valid,
            rs,
            es,
            **self.constants,
            ROW_STRIDE=E if rs == E and es == 1 else 0,
            EXPERT_STRIDE=1 if es == 1 else 0,
            VALID_ON_DEVICE=on_device,
            BLOCK_T=bt,
            num_warps=1,
        )
        return out


def build(problem, device):
    return TritonRouter(problem, device)
