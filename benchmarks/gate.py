"""Time ``gate`` of the Triton backend next to PyTorch's operations.

    python benchmarks/gate.py OUT.json [--launches] [TOKENS ...]

With ``--launches`` other launches and slices than those that ship are timed too.

Microseconds a call: the median of CUDA-graph replays over hidden states in turns; the router weight
is the same, so it stays in the cache, and for ``cold`` each call has its own. In the same run: the
chain of PyTorch's norm and linear layer with our routing, the linear layer alone, PyTorch's product
of bfloat16 matrices into float32 logits with our routing (``product``), and hidden states to a
dispatch plan by a call of the package (``plan``). Before that, what every launch computes is
compared with the float64 oracle, and the bits of a row among all launches and batches.
"""

from __future__ import annotations

import itertools
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import launches
import torch

import moe_routing
from moe_routing.gating import GateOutput, GateProblem, Projection
from moe_routing.reference import gate_oracle
from moe_routing_backends.triton.gating import gate as host
from moe_routing_backends.triton.gating.launches import GateLaunch, Order, launches_for, order_of
from moe_routing_backends.triton.runtime import router
from moe_routing_backends.triton.tuning.measure import LEAST_SETS, replayed
from moe_routing_registry import RoutingSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

DEVICE = "cuda:0"
TOKENS = (1, 8, 16, 64, 256, 1024, 4096, 16384)
SLICES = (64, 128, 256, 512)
TRIED = (
    *((16, 64, 4, "slice"), (32, 64, 4, "slice"), (64, 64, 4, "slice"), (64, 128, 8, "slice")),
    *((64, 64, 4, "group", 1), (32, 128, 8, "group", 3), (64, 128, 8, "group", 3)),
    *((32, 64, 4, "all"), (32, 128, 8, "all", 3), (64, 128, 8, "all", 1), (64, 128, 8, "all", 3)),
)
"""Launches that are tried: tokens and experts a program, its warps, what it takes, and stages."""
BATCHES = (1, 2, 7, 16, 33, 64, 65, 200, 1024, 1500, 5000)
"""Numbers of tokens among which the bits of a row are compared."""
OTHERS = ("linear", "chain", "product", "gate", "cold", "plan")
"""What is timed besides launches that are tried."""
MOST_BYTES = 4 << 30
"""Of the hidden states that are taken in turns."""


class Model(NamedTuple):
    """A router's shape.

    :ivar norm: Gemma 4's: a norm without a weight, a scale of columns, and a multiplier.
    """

    name: str
    hidden_size: int
    experts: int
    spec: RoutingSpec
    norm: bool = False
    float32_weight: bool = False


SOFTMAX = RoutingSpec(family="topk_softmax", renormalize=True)
DEEPSEEK = RoutingSpec(
    family="grouped_sigmoid_bias", score="sigmoid", selection="scores_plus_bias", renormalize=True,
    renorm_epsilon=1e-20, scale=2.5, num_groups=8, topk_groups=4, group_sum=2,
)  # fmt: skip
MODELS = (
    Model(
        "Gemma4-26B-A4B", 2816, 128,
        RoutingSpec(family="gemma4", renormalize=True, per_expert_scale=True), norm=True,
    ),
    Model("Qwen3-30B-A3B", 2048, 128, SOFTMAX),
    Model("Qwen3-235B-A22B", 4096, 128, SOFTMAX),
    Model("DeepSeek-V3", 7168, 256, DEEPSEEK, float32_weight=True),
    Model("DeepSeek-V3, bfloat16 weight", 7168, 256, DEEPSEEK),
)  # fmt: skip


class Built(NamedTuple):
    """A problem with the operands that do not depend on the batch."""

    problem: GateProblem
    projection: Projection
    operands: dict[str, Any]


def built(model: Model, seed: int = 0) -> Built:
    """Return a router's problem and parameters; its hidden states are of no token."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    drawn = partial(torch.randn, device=DEVICE, generator=generator)
    E, H = model.experts, model.hidden_size
    problem = GateProblem(
        spec=model.spec, num_experts=E, topk=8, hidden_size=H, dtype="bfloat16",
        float32_weight=model.float32_weight, norm="rms" if model.norm else "",
        input_scale=model.norm,
    )  # fmt: skip
    weight = drawn(E, H) * (1.0 if model.norm else 2 / H**0.5)
    projection = Projection(
        torch.empty(0, H, dtype=torch.bfloat16, device=DEVICE),
        weight.to(getattr(torch, problem.weight_dtype)),
        input_scale=(drawn(H) * 0.2 + 1).bfloat16() if model.norm else None,
        eps=1e-6 if model.norm else None,
        multiplier=H**-0.5 if model.norm else 1.0,
    )
    operands: dict[str, Any] = {}
    if model.spec.per_expert_scale:
        operands["per_expert_scale"] = torch.rand(E, device=DEVICE, generator=generator)
    if model.spec.needs_bias:
        operands["bias"] = drawn(E) * 0.1
    return Built(problem, projection, operands)


def kernel(problem: GateProblem, of: Sequence[GateLaunch] | None) -> host.TritonGate:
    """Return the kernel, with these launches or those that ship."""
    device = moe_routing.probe(DEVICE)
    return host.TritonGate(problem, device, router.build(problem.routing, device), of)


def in_slices_of(columns: int) -> Callable[..., Order]:
    """Return ``order_of`` for slices of another length."""

    def order(problem: GateProblem, vectors: Sequence[torch.dtype], arch: str | None) -> Order:
        known = order_of(problem, vectors, arch)
        return known._replace(slice=columns, step=min(known.step, columns))

    return order


def check(model: Model, of: Sequence[GateLaunch] | None, said: str) -> None:
    """Compare with the oracle, and the bits among batches and of both calls of the protocol."""
    problem, projection, operands = built(model)
    gate = kernel(problem, of)
    hidden = torch.randn(max(BATCHES), model.hidden_size, device=DEVICE).bfloat16()
    whole: Tensor | None = None
    for tokens in reversed(BATCHES):
        order = torch.randperm(max(BATCHES), device=DEVICE)[:tokens]
        some = projection._replace(hidden=hidden[order])
        logits = hidden.new_empty((tokens, model.experts), dtype=torch.float32)
        alone = torch.empty_like(logits)
        made = GateOutput(*gate.routed(some, logits, **operands), logits)
        gate(some, alone)
        if whole is None:
            whole = torch.empty_like(logits)
            whole[order] = logits
        if not (torch.equal(alone, logits) and torch.equal(logits, whole[order])):
            sys.exit(f"{said}: other bits at T = {tokens}")
        found = gate_oracle.output_problems(problem.spec, some, problem.topk, made, **operands)
        if found:
            sys.exit(f"{said}, T = {tokens}: {found[0]}")


def chain(b: Built, hidden: Tensor) -> object:
    """Compute the logits by PyTorch, as a model does, and route them by us."""
    x = hidden
    if b.projection.eps is not None:
        x = torch.nn.functional.rms_norm(x, (x.shape[1],), eps=b.projection.eps)
        assert b.projection.input_scale is not None  # noqa: S101 -- for mypy
        x = x * b.projection.input_scale * b.projection.multiplier
    weight = b.projection.router_weight
    logits = torch.nn.functional.linear(x.to(weight.dtype), weight)
    route = moe_routing.get_router(b.problem.spec)
    return route(logits, b.problem.topk, **b.operands)


def product(b: Built, hidden: Tensor) -> object:
    """Compute float32 logits of bfloat16 matrices by PyTorch, and route them by us."""
    logits = torch.mm(hidden, b.projection.router_weight.t(), out_dtype=torch.float32)
    return moe_routing.get_router(b.problem.spec)(logits, b.problem.topk, **b.operands)


def planned(b: Built, hidden: Tensor) -> object:
    """Call the package: hidden states to weights, ids and a dispatch plan."""
    _, weight, _, _, input_scale, eps, multiplier = b.projection
    return moe_routing.get_router(b.problem.spec).gate.with_plan(
        hidden, weight, b.problem.topk, input_scale=input_scale, input_multiplier=multiplier,
        norm=None if eps is None else moe_routing.RMSNorm(eps=eps), **b.operands,
    )  # fmt: skip


def timed(model: Model, tokens: int, *, tries: bool) -> dict[str, float]:
    """Return microseconds a call, by what is called.

    :param tries: time launches that do not ship too.
    """
    b = built(model)
    count = max(2, min(LEAST_SETS, MOST_BYTES // (tokens * model.hidden_size * 2)))
    hidden = [
        torch.randn(tokens, model.hidden_size, device=DEVICE).bfloat16() for _ in range(count)
    ]
    device = torch.device(DEVICE)

    def turns(call: Callable[[Tensor], object]) -> float:
        each = itertools.cycle(hidden)
        return round(replayed(lambda: call(next(each)), device), 2)

    weight = b.projection.router_weight
    us = {"linear": turns(lambda x: torch.nn.functional.linear(x.to(weight.dtype), weight))}
    us["chain"] = turns(partial(chain, b))
    if not (b.problem.float32_weight or b.projection.eps):
        us["product"] = turns(partial(product, b))

    def gated(gate: host.TritonGate) -> float:
        return turns(lambda x: gate.routed(b.projection._replace(hidden=x), None, **b.operands))

    us["gate"] = gated(kernel(b.problem, None))
    others = itertools.cycle([built(model, seed).projection for seed in range(60)])
    gate = kernel(b.problem, None)
    us["cold"] = turns(lambda x: gate.routed(next(others)._replace(hidden=x), None, **b.operands))
    us["plan"] = turns(partial(planned, b))
    for tile, columns in itertools.product(TRIED, SLICES) if tries else ():
        of = GateLaunch(None, *tile)
        if tokens > 2048 if of.takes == "slice" else tokens < 512:  # noqa: PLR2004 -- too slow
            continue
        host.order_of = in_slices_of(columns)  # type: ignore[assignment] # tried here
        name = f"{of.takes} {of.block_t}x{of.block_e}/{of.num_warps} {of.stages}, {columns}"
        try:
            us[name] = gated(kernel(b.problem, (of,)))
        except Exception as error:  # noqa: BLE001 -- a shape that does not fit is no result
            print(f"{model.name} {of}: {type(error).__name__}", flush=True)
        finally:
            host.order_of = order_of
    return us


def main() -> None:
    """Check, time, print and write."""
    torch.manual_seed(0)
    out, *rest = sys.argv[1:]
    tries = "--launches" in rest
    sizes = tuple(int(word) for word in rest if word != "--launches") or TOKENS
    for model in MODELS:
        check(model, None, model.name)
        for launch in launches_for(moe_routing.probe(DEVICE), built(model).problem):
            check(model, (launch._replace(logits=None),), f"{model.name}, {launch}")
    print("all right", flush=True)
    results = []
    for model, tokens in itertools.product(MODELS, sizes):
        us = timed(model, tokens, tries=tries)
        results.append({"model": model.name, "T": tokens, "us": us})
        shown = "".join(f"{us.get(name, 0):9.2f}" for name in OTHERS)
        best = min(((t, n) for n, t in us.items() if n not in OTHERS), default=None)
        print(f"{model.name:16} {tokens:6}{shown}", *(best or ()), flush=True)
        launches.write(Path(out), "microseconds a call of gate", results=results)


if __name__ == "__main__":
    main()
