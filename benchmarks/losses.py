"""Time and memory of balancing losses on a CUDA device: ours, PyTorch's operations, transformers'.

    python benchmarks/losses.py OUT.json

48 layers of 16,384 tokens, 128 experts, K = 8, in bfloat16 and float32. Milliseconds are of a
clock on the host, from an idle device until it is idle again: the least of some runs. On a slow
host most of that is launches, so the times of all kernels are added up too (``device_ms``).

Memory is what the caching allocator held at most above what it held before the call, in MiB: after
the forward, and in all; gradients of logits are dropped when they are made, as a model's backward
does. Everything is compared with float64 first. Needs transformers; about a minute on an H100.
"""

from __future__ import annotations

import sys
import time
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import launches
import torch
from torch.profiler import ProfilerActivity, profile
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import moe_routing
from moe_routing.balancing import load_balancing_loss, sequence_balancing_loss, z_loss
from moe_routing.balancing.problem import LOGSUMEXP, SCORES
from moe_routing.balancing.sums import sums
from moe_routing.formula.balance import summed, summed_backward
from moe_routing.integrations.transformers._balance import load_balancing_loss as of_patch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

LAYERS, T, E, K = 48, 16_384, 128, 8
RUNS = 7
DEVICE = "cuda:0"
MIB = 2**20
NEAR = 2e-4
"""Of losses, relative: in bfloat16 two of a token's scores may be equal, and either is the best."""


class Inputs(NamedTuple):
    """Logits of all layers, as one tensor and as a tensor for each, and what a router returned."""

    whole: Tensor
    layers: tuple[Tensor, ...]
    ids: Tensor


def drawn(dtype: torch.dtype) -> Inputs:
    """Return leaves whose gradients are dropped when they are made."""
    whole = torch.randn(LAYERS, T, E, device=DEVICE).to(dtype)
    ids = torch.stack([moe_routing.get_router("qwen3_moe")(layer, K).ids for layer in whole])
    layers = tuple(layer.clone().requires_grad_() for layer in whole)
    for leaf in (whole.requires_grad_(), *layers):
        leaf.register_post_accumulate_grad_hook(lambda leaf: setattr(leaf, "grad", None))
    return Inputs(whole, layers, ids)


def check() -> None:
    """Compare sums, counts and gradients of the Triton backend with the formulas in float64."""
    kinds = (*((score, 0) for score in SCORES), ("softmax", K), (LOGSUMEXP, 0))
    for (score, best), dtype, experts, masked in product(
        kinds, (torch.bfloat16, torch.float16, torch.float32), (E, 60), (False, True)
    ):
        logits = (torch.randn(3, 1001, experts, device=DEVICE) * 2).to(dtype)
        if best:  # so far apart that no rounding decides which are the best
            order = torch.rand(logits.shape, device=DEVICE).argsort(-1)
            logits = (order * (-1 / 16)).to(dtype)
        ids = torch.randint(-1, experts + 1, (3, 1001, K), device=DEVICE)
        ids = None if best or score == LOGSUMEXP else ids
        weights = torch.rand(3, 1001, device=DEVICE) < 0.7 if masked else None  # noqa: PLR2004 -- a share
        weights = weights.float() if masked and best else weights  # type: ignore[union-attr] # masked
        leaf = logits.clone().requires_grad_()
        with moe_routing.prefer("triton"):
            made, counts = sums((leaf,), ids, weights, score, best)
        grad = torch.randn(made.shape, device=DEVICE)
        (gradient,) = torch.autograd.grad(made, leaf, grad)
        exactly = logits if best else logits.double()
        right, right_counts = summed(exactly, ids, weights, score, best)
        right_grad = summed_backward(
            grad if best else grad.double(), exactly, weights, score, best
        ).double()
        eps = torch.finfo(dtype).eps
        said = f"{score}, best {best}, {dtype}, E = {experts}, masked {masked}"
        # Sums of some thousand float32 terms, in another order, differ by more than one rounding.
        close(made, right, max(eps if best else 0.0, 1e-5), f"{said}: sums")
        close(counts, right_counts, 0.0, f"{said}: counts")
        close(gradient, right_grad, eps * (4 if best else 1) + 1e-5, f"{said}: gradient")


def close(made: Tensor, right: Tensor, near: float, said: str) -> None:
    """End with what is wrong unless the values are as near as that, next to the largest."""
    made, right = made.double(), right.double()
    largest = right.abs().max() if right.numel() else 0.0
    if not bool(((made - right).abs() <= near * (right.abs() + largest)).all()):
        worst = (made - right).abs().max().item()
        sys.exit(f"{said}: wrong by up to {worst}")


def losses(inputs: Inputs) -> dict[str, dict[str, Callable[[], Any]]]:
    """Return the losses by what computes them, those that must be equal together."""
    whole, layers, ids = inputs

    def by(backend: str, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with moe_routing.prefer(backend):
                return loss()

        return call

    ours: dict[str, Callable[[], Tensor]] = {
        "load balancing": lambda: load_balancing_loss(whole, ids) * K,
        "load balancing of sequences, sigmoid": lambda: sequence_balancing_loss(
            whole, ids, score="sigmoid"
        ),
        "z": lambda: z_loss(whole),
        "load balancing, patch(loss=True)": lambda: of_patch(layers, E, K),  # type: ignore[return-value,dict-item] # a tensor
    }
    named = {
        name: {backend: by(backend, loss) for backend in ("triton", "eager")}
        for name, loss in ours.items()
    }
    for name in ("load balancing", "load balancing, patch(loss=True)"):
        named[name]["transformers"] = lambda: load_balancing_loss_func(layers, E, K)
    return named


def exact(inputs: Inputs) -> float:
    """Return transformers' loss in float64, of one layer after the other."""
    total = torch.zeros(E, dtype=torch.float64, device=DEVICE)
    for layer in inputs.whole.detach():
        total += layer.double().softmax(-1).sum(0)
    share = inputs.ids.flatten().long().bincount(minlength=E).double() / (LAYERS * T)
    return float((share * total / (LAYERS * T)).sum() * E)


def timed(loss: Callable[[], Tensor]) -> dict[str, float]:
    """Return milliseconds and MiB of a forward and of a backward; on the device, of both."""
    loss().backward()  # compiles
    runs = []
    for _ in range(RUNS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        value = loss()
        torch.cuda.synchronize()
        middle = time.perf_counter()
        value.backward()
        torch.cuda.synchronize()
        runs.append((middle - start, time.perf_counter() - middle))
    del value
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        loss().backward()
        torch.cuda.synchronize()
    device = sum(event.self_device_time_total for event in seen.key_averages()) / 1e3
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    value = loss()
    kept = torch.cuda.memory_allocated() - before
    forward = torch.cuda.max_memory_allocated() - before
    value.backward()
    peak = torch.cuda.max_memory_allocated() - before
    ms = [min(column) * 1e3 for column in zip(*runs, strict=True)]
    return {
        "forward_ms": round(ms[0], 3), "backward_ms": round(ms[1], 3),
        "device_ms": round(device, 3),
        "kept_mib": round(kept / MIB, 2), "forward_peak_mib": round(forward / MIB, 2),
        "peak_mib": round(peak / MIB, 2),
    }  # fmt: skip


def main() -> None:
    """Check, time, print and write."""
    torch.manual_seed(0)
    check()
    print("all right", flush=True)
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        inputs = drawn(dtype)
        right = exact(inputs)
        for name, ways in losses(inputs).items():
            values = {way: loss().item() for way, loss in ways.items()}
            expected = right if "transformers" in ways else values["eager"]
            wrong = {w: v for w, v in values.items() if abs(v - expected) > NEAR * expected}
            if wrong:
                sys.exit(f"{name}, {dtype}: expected {expected}, got {wrong}")
            for way, loss in ways.items():
                made = timed(loss)
                results.append({"loss": name, "by": way, "dtype": str(dtype)[6:], **made})
                print(
                    f"{dtype} {name:38} {way:13}", *(f"{v:10}" for v in made.values()), flush=True
                )
        del inputs
    what = f"balancing losses of {LAYERS} layers, T = {T}, E = {E}, K = {K}: ms, and MiB"
    launches.write(Path(sys.argv[1]), what, results=results)


if __name__ == "__main__":
    main()
