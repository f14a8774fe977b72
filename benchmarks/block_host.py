"""Time what the block around the experts costs the host, where no graph is captured.

    python benchmarks/block_host.py OUT.json [--cpu]

The block of Gemma4-26B-A4B, from hidden states to experts and back, without the experts' products:
in transformers a router, and what ``grouped_mm_experts_forward`` does besides the products and the
activation, which return memory that is there. Ours: ``gate``, ``plan``, ``permute`` and
``combine``, apart, and with ``gate.with_plan``. Microseconds of the host's clock a block: medians
over blocks of 50 calls between synchronisations, in turns. Experts are compared first.

``--cpu`` only tries the script.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import launches
import torch
import transformers
from e2e_gemma4 import SHAPES
from transformers.integrations import moe
from transformers.models.gemma4 import modeling_gemma4

import moe_routing

if TYPE_CHECKING:
    from collections.abc import Callable

TOKENS = (1, 16)
CALLS, TURNS = 50, 40
IN_COMMON = 0.95
"""Of the experts of transformers, which rounds to bfloat16 in front of the logits, and of ours."""


class Block:
    """One layer's router and experts, and the ways to compute what is around the products."""

    def __init__(self, tokens: int, device: str) -> None:
        """Make the modules, with random weights, and hidden states."""
        torch.manual_seed(0)
        config = transformers.Gemma4TextConfig(**SHAPES["gemma4"].real)
        config._experts_implementation = "grouped_mm"  # noqa: SLF001 -- as a model's own constructor sets it
        with torch.device(device):
            self.router = modeling_gemma4.Gemma4TextRouter(config).bfloat16()
            self.experts = modeling_gemma4.Gemma4TextExperts(config).bfloat16()
            self.router.proj.weight.data.normal_()
            self.router.per_expert_scale.data.uniform_(0.5, 1.5)
            self.hidden = torch.randn(tokens, config.hidden_size, dtype=torch.bfloat16)
            self.made = torch.randn(
                tokens * config.top_k_experts, config.hidden_size, dtype=torch.bfloat16
            )
        self.topk = config.top_k_experts
        self.norm = moe_routing.RMSNorm(config.rms_norm_eps)
        self.route = moe_routing.get_router("gemma4")
        self.experts._apply_gate = lambda given: given  # noqa: SLF001 -- the activation is no part of the block

    def stock(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Call transformers' modules."""
        _, weights, ids = self.router(self.hidden)
        return weights, ids, self.experts(self.hidden, ids, weights)

    def gated(self, call: Callable[..., Any]) -> Any:  # noqa: ANN401 -- what the call returns
        """Call ``gate`` or its ``with_plan``."""
        router = self.router
        return call(
            self.hidden, router.proj.weight, self.topk, router.per_expert_scale, norm=self.norm,
            input_scale=router.scale, input_multiplier=router.scalar_root_size,
        )  # fmt: skip

    def apart(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Call four operations."""
        weights, ids = self.gated(self.route.gate)
        plan = moe_routing.plan(ids, self.experts.num_experts)
        moe_routing.permute(self.hidden, plan)
        return weights, ids, moe_routing.combine(self.made, plan, weights)

    def with_plan(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Call three, of which the first plans."""
        weights, ids, plan = self.gated(self.route.gate.with_plan)
        moe_routing.permute(self.hidden, plan)
        return weights, ids, moe_routing.combine(self.made, plan, weights)

    def parts(self) -> dict[str, Callable[[], object]]:
        """Return our operations, each by itself."""
        weights, ids = self.gated(self.route.gate)
        plan = moe_routing.plan(ids, self.experts.num_experts)
        return {
            "gate": lambda: self.gated(self.route.gate),
            "plan": lambda: moe_routing.plan(ids, self.experts.num_experts),
            "gate.with_plan": lambda: self.gated(self.route.gate.with_plan),
            "permute": lambda: moe_routing.permute(self.hidden, plan),
            "combine": lambda: moe_routing.combine(self.made, plan, weights),
        }

    def check(self) -> None:
        """Compare the experts of all ways, and the outcome of both of ours."""
        (_, ids, _), apart, with_plan = self.stock(), self.apart(), self.with_plan()
        same = (apart[1].long()[:, :, None] == ids.long()[:, None, :]).any(-1).float().mean()
        if same < IN_COMMON:
            sys.exit(f"{same:.0%} of the experts are those of transformers")
        if not all(map(torch.equal, apart, with_plan)):
            sys.exit("other results with a plan")


def taken(ways: dict[str, Callable[[], object]], wait: Callable[[], None]) -> dict[str, float]:
    """Return the median microseconds that a call takes the host, in turns."""
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(TURNS + 1):
        for name, call in ways.items():
            wait()
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            if turn:  # the first one warms up
                samples[name].append((time.perf_counter() - start) / CALLS * 1e6)
    return {name: round(statistics.median(found), 1) for name, found in samples.items()}


def main() -> None:
    """Check, time, print and write."""
    out, *rest = sys.argv[1:]
    device = "cpu" if "--cpu" in rest else "cuda"
    wait = (lambda: None) if device == "cpu" else torch.cuda.synchronize
    results = []
    for tokens in TOKENS:
        block = Block(tokens, device)
        moe._grouped_linear = lambda *_, block=block, **__: block.made  # noqa: SLF001 -- the product is no part of the block
        with torch.no_grad():
            block.check()
            us = taken(
                {
                    "transformers": block.stock,
                    "gate, plan, permute, combine": block.apart,
                    "gate.with_plan, permute, combine": block.with_plan,
                    **block.parts(),
                },
                wait,
            )
        results.append({"T": tokens, "us": us})
        print(tokens, us, flush=True)
    launches.write(
        Path(out), "microseconds of the host a block", transformers=transformers.__version__,
        results=results,
    )  # fmt: skip


if __name__ == "__main__":
    main()
