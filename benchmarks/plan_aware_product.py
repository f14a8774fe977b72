"""Time a grouped product that gathers its rows itself, and one that adds into the tokens' rows.

    python benchmarks/plan_aware_product.py OUT.json

Needs an NVIDIA GPU. The question is whether a product that knows the plan is worth writing: the
first product could read the rows of tokens by ``plan.order``, so that ``permute`` is not needed,
and the second could add what it computes to the rows of tokens, so that ``combine`` is not. A
sketch of both in Triton, over a plan in blocks, is timed with PyTorch's grouped product, and with
``permute`` and ``combine``, for a layer of experts of Gemma4's shape in bfloat16. Microseconds: the
median of CUDA-graph replays, the weights of several layers in turn, so that they come from memory
as in a model.
"""

from __future__ import annotations

import datetime as dt
import itertools
import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

import moe_routing
from moe_routing_backends.triton.tuning.measure import replayed

H, INNER, E, K = 2816, 704, 128, 8
LAYERS = 4
BATCHES = (1, 16, 64, 256)
BLOCK = 16
"""Places of a block: the least rows of a product on the matrix units."""
SHAPES = tuple(itertools.product((32, 64, 128), (64, 128, 256), (4,), (3, 4)))
"""Columns of a tile, its depth, warps, stages."""


@triton.jit
def product(
    rows, weights, out, order, block_experts, scales, pairs, N, D, DIVIDE: tl.constexpr,
    GATHERED: tl.constexpr, ADDED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """Multiply a block of rows by a tile of its expert's weights ``[N, D]``."""
    block = tl.program_id(0)
    expert = tl.load(block_experts + block)
    if expert >= 0:
        place = block * BM + tl.arange(0, BM)
        pair = tl.load(order + place)
        full = pair < pairs
        row = tl.where(full, pair // DIVIDE, 0) if GATHERED else place
        column = tl.program_id(1) * BN + tl.arange(0, BN)
        depth = tl.arange(0, BD)
        total = tl.zeros([BM, BN], tl.float32)
        of_rows = rows + row[:, None].to(tl.int64) * D
        of_expert = weights + (expert.to(tl.int64) * N + column[:, None]) * D
        for first in range(0, D, BD):
            inside = first + depth < D
            a = tl.load(
                of_rows + first + depth[None, :], mask=full[:, None] & inside[None, :], other=0.0
            )
            b = tl.load(
                of_expert + first + depth[None, :],
                mask=(column < N)[:, None] & inside[None, :],
                other=0.0,
            )
            total = tl.dot(a, tl.trans(b), total)
        kept = full[:, None] & (column < N)[None, :]
        if ADDED:
            scale = tl.load(scales + pair, mask=full, other=0.0)
            token = tl.where(full, pair // DIVIDE, 0)
            at = out + token[:, None].to(tl.int64) * N + column[None, :]
            tl.atomic_add(at, total * scale[:, None], mask=kept, sem="relaxed")
        else:
            at = out + place[:, None].to(tl.int64) * N + column[None, :]
            tl.store(at, total.to(out.dtype.element_ty), mask=kept)


class Turns:
    """The numbers of the layers, again and again."""

    def __init__(self) -> None:
        """Begin with layer 0."""
        self._next = 0

    def __next__(self) -> int:
        """Return the layer whose turn it is."""
        layer, self._next = self._next, (self._next + 1) % LAYERS
        return layer

    def begin(self) -> None:
        """Begin with layer 0 again."""
        self._next = 0


def best(make: Any, device: torch.device) -> tuple[float, str]:
    """Return the least time of the shapes, and which it is."""
    found = []
    for shape in SHAPES:
        with suppress(triton.runtime.errors.OutOfResources):
            found.append((replayed(make(*shape), device), " ".join(map(str, shape))))
    return min(found)


def measured(batch: int, device: torch.device) -> dict[str, Any]:
    """Return the times of a batch."""
    generator = torch.Generator(device=device).manual_seed(batch)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)

    hidden, up = drawn(batch, H), [drawn(E, 2 * INNER, H) / 50 for _ in range(LAYERS)]
    down = [drawn(E, H, INNER) / 25 for _ in range(LAYERS)]
    logits = drawn(batch, E)
    weights, ids = moe_routing.get_router("gemma4")(logits, K, torch.ones(E, device=device))
    plan = moe_routing.plan(ids, E)
    blocks = moe_routing.plan(ids, E, block=BLOCK)
    assert blocks.block_experts is not None  # noqa: S101 -- for mypy: a plan in blocks has them
    ends, places = plan.offsets[1:], blocks.order.shape[0]
    rows = moe_routing.permute(hidden, plan)
    half = drawn(batch * K, INNER)
    made = torch._grouped_mm(half, down[0].transpose(1, 2), offs=ends)  # noqa: SLF001 -- what transformers calls
    in_blocks = drawn(places, INNER)
    in_blocks[blocks.inverse.flatten().long()] = half[plan.inverse.flatten().long()]
    first = torch.empty(places, 2 * INNER, device=device, dtype=torch.bfloat16)
    second = torch.zeros(batch, H, device=device)
    by_layer = Turns()

    def gathered(bn: int, bd: int, warps: int, stages: int) -> Any:
        grid = (places // BLOCK, triton.cdiv(2 * INNER, bn))
        return lambda: product[grid](
            hidden, up[next(by_layer)], first, blocks.order, blocks.block_experts, weights,
            batch * K, 2 * INNER, H, DIVIDE=K, GATHERED=True, ADDED=False, BM=BLOCK, BN=bn, BD=bd,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip

    def added(bn: int, bd: int, warps: int, stages: int) -> Any:
        grid = (places // BLOCK, triton.cdiv(H, bn))

        def work() -> None:
            second.zero_()
            product[grid](
                in_blocks, down[next(by_layer)], second, blocks.order, blocks.block_experts,
                weights, batch * K, H, INNER, DIVIDE=K, GATHERED=False, ADDED=True, BM=BLOCK, BN=bn,
                BD=bd, num_warps=warps, num_stages=stages,
            )  # fmt: skip

        return work

    def right(found: torch.Tensor, wanted: torch.Tensor) -> None:
        error = (found.float() - wanted.float()).norm() / wanted.float().norm()
        if error > 0.02:  # noqa: PLR2004 -- bfloat16
            sys.exit(f"batch {batch}: a product is wrong by {error:.3f}")

    gathered(64, 64, 4, 3)()  # of layer 0
    wanted = torch._grouped_mm(rows, up[0].transpose(1, 2), offs=ends)  # noqa: SLF001 -- as above
    right(first[blocks.inverse.flatten().long()], wanted[plan.inverse.flatten().long()])
    by_layer.begin()
    added(64, 64, 4, 3)()
    right(second, moe_routing.combine(made, plan, weights))
    grouped = torch._grouped_mm  # noqa: SLF001 -- as above
    result: dict[str, Any] = {
        "permute": replayed(lambda: moe_routing.permute(hidden, plan), device),
        "first product": replayed(
            lambda: grouped(rows, up[next(by_layer)].transpose(1, 2), offs=ends), device
        ),
        "second product": replayed(
            lambda: grouped(half, down[next(by_layer)].transpose(1, 2), offs=ends), device
        ),
        "combine": replayed(lambda: moe_routing.combine(made, plan, weights), device),
    }
    result["gathering product"], result["its shape"] = best(gathered, device)
    result["adding product"], result["its own shape"] = best(added, device)
    return result


def main() -> None:
    """Measure, print and write."""
    device = torch.device("cuda:0")
    found = {}
    for batch in BATCHES:
        found[batch] = measured(batch, device)
        shown = {k: round(v, 1) if isinstance(v, float) else v for k, v in found[batch].items()}
        print(batch, shown, flush=True)
    Path(sys.argv[1]).write_text(
        json.dumps(
            {
                "what": "microseconds of a call, median of CUDA-graph replays; Gemma4's experts",
                "device": torch.cuda.get_device_name(),
                "with": f"torch {torch.__version__} and Triton {triton.__version__}",
                "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
                "batches": found,
            },
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
