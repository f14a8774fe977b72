"""Count the rows whose logits and experts depend on the batch that they are in.

    python benchmarks/batches.py OUT.json [DEVICE]

The same 4,096 rows of normal hidden states in bfloat16 go through a router at once, and in batches
of 1 to 1,024: by a chain of PyTorch's operations, with logits in bfloat16 and in float32, and by
``Router.gate``. A row counts where one bit of its logits, or its set of experts, is not that of the
whole batch. Some minutes on a CPU.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import launches
import torch
from torch.nn.functional import linear, rms_norm

import moe_routing
from moe_routing.gating import GateOutput

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

ROWS = 4096
BATCHES = (1, 7, 16, 64, 256, 1024)


class Shape(NamedTuple):
    """A model's router.

    :ivar family: what routes its logits.
    :ivar norm: Gemma 4's: a norm without a weight, a scale of columns, and a multiplier.
    """

    family: str
    hidden_size: int
    experts: int
    topk: int = 8
    norm: bool = False


SHAPES = {
    "Gemma4-26B-A4B": Shape("gemma4", 2816, 128, norm=True),
    "Qwen3-30B-A3B": Shape("topk_softmax", 2048, 128),
    "DeepSeek-V3": Shape("deepseek_v3", 7168, 256),
    "gpt-oss-20B": Shape("gpt_oss", 2880, 32, 4),
}


def ways(shape: Shape, device: torch.device) -> dict[str, Callable[[Tensor], GateOutput]]:
    """Return what gates hidden states, by name."""
    drawn = partial(torch.randn, device=device)
    E, H = shape.experts, shape.hidden_size
    # Logits of standard deviation 1.
    weight = (drawn(E, H) * (1.0 if shape.norm else H**-0.5)).bfloat16()
    scale = (drawn(H) * 0.2 + 1).bfloat16() if shape.norm else None
    route = moe_routing.get_router(shape.family)
    operands: dict[str, Any] = {}
    if route.spec.needs_bias:
        operands["bias"] = drawn(E) * 0.1
    if route.spec.per_expert_scale:
        operands["per_expert_scale"] = drawn(E).abs()

    weights = {dtype: weight.to(dtype) for dtype in (torch.bfloat16, torch.float32)}

    def chain(hidden: Tensor, dtype: torch.dtype) -> GateOutput:
        x = hidden
        if scale is not None:
            x = rms_norm(x, (H,), eps=1e-6) * scale * H**-0.5
        logits = linear(x.to(dtype), weights[dtype])
        return GateOutput(*route(logits, shape.topk, **operands), logits)

    def ours(hidden: Tensor, dtype: torch.dtype) -> GateOutput:
        return route.gate(
            hidden, weight, shape.topk,
            norm=moe_routing.RMSNorm(1e-6) if shape.norm else None, input_scale=scale,
            input_multiplier=H**-0.5 if shape.norm else 1.0, logits_dtype=dtype,
            return_logits=True, **operands,
        )  # fmt: skip

    return {
        f"{name}, {kind} logits": partial(way, dtype=dtype)
        for name, way in (("PyTorch", chain), ("gate", ours))
        for kind, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32))
    }


def counted(gate: Callable[[Tensor], GateOutput], hidden: Tensor) -> dict[str, dict[str, int]]:
    """Return how many rows have other logits and other experts, by the size of the batch."""
    whole = gate(hidden)
    found = {}
    for batch in BATCHES:
        parts = [gate(some) for some in hidden.split(batch)]
        logits, ids = torch.cat([p.logits for p in parts]), torch.cat([p.ids for p in parts])
        sets = [i.sort(dim=1).values for i in (ids, whole.ids)]
        found[str(batch)] = {
            "logits": int((logits != whole.logits).any(dim=1).sum()),
            "experts": int((sets[0] != sets[1]).any(dim=1).sum()),
        }
    return found


@torch.no_grad()
def main() -> None:
    """Count, print and write."""
    torch.manual_seed(0)
    out, device = Path(sys.argv[1]), torch.device(*sys.argv[2:3] or ("cpu",))
    results: list[dict[str, Any]] = []
    for name, shape in SHAPES.items():
        hidden = torch.randn(ROWS, shape.hidden_size, device=device).bfloat16()
        for way, gate in ways(shape, device).items():
            rows = counted(gate, hidden)
            results.append({"model": name, "way": way, "rows": rows})
            told = "  ".join(f"{b}: {n['logits']} / {n['experts']}" for b, n in rows.items())
            print(f"{name:16} {way:26} {told}", flush=True)
    what = f"rows of {ROWS} whose logits, and whose experts, are not those of the whole batch"
    name = moe_routing.probe(device).name
    launches.write(out, what, device=name, rows=ROWS, by_batch=results)


if __name__ == "__main__":
    main()
