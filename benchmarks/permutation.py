"""Time ``permute`` and ``combine`` of the Triton backend, for some shapes of launches.

    python benchmarks/permutation.py OUT.json [TOKENS ...]

Microseconds a call: the median of CUDA-graph replays over inputs in turns. In the same run: a copy
that reads and writes as many bytes, and PyTorch's own operations for the same. Everything is
compared with the formulas first, at a few tokens and in all layouts, to the bit but for the sums of
the weights' gradients. Less than two minutes on an H100.
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
from moe_routing.formula import permutation as formula
from moe_routing.permutation import CombineProblem, PermuteProblem
from moe_routing.permutation.problem import GROUP
from moe_routing_backends.triton.permutation.mover import MoveLaunch, TritonCombine, TritonPermute
from moe_routing_backends.triton.tuning.measure import LEAST_SETS, replayed

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from moe_routing.planning import DispatchPlan

K = 8
MODELS = ((2816, 128), (7168, 256))
"""Columns and experts: Gemma4's and DeepSeek-V3's."""
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
LAUNCHES = (
    MoveLaunch(32, 32, early=True),
    MoveLaunch(128, 128, early=True),
    MoveLaunch(128, 128, early=False),
    MoveLaunch(256, 128, early=False),
    MoveLaunch(512, 256, early=False),
)
FLOAT8 = torch.float8_e4m3fn
MOST_BYTES = 6 << 30
"""Of the inputs and outputs that are taken in turns."""
DEVICE = "cuda:0"


class Case(NamedTuple):
    """What a call takes and writes."""

    hidden: Tensor
    plan: DispatchPlan
    token: Tensor
    pair: Tensor
    weights: Tensor
    rows: Tensor
    values: Tensor
    scales: Tensor
    out: Tensor
    grad_rows: Tensor
    grad_weights: Tensor


def drawn(
    tokens: int,
    columns: int,
    experts: int,
    dtype: torch.dtype,
    missing: float,
    **layout: Any,  # noqa: ANN401 -- as ``plan`` takes it
) -> Case:
    """Return random rows and a plan; a share of the pairs has no expert."""
    ids = torch.rand(tokens, experts, device=DEVICE).topk(K).indices
    ids = ids.masked_fill(torch.rand(ids.shape, device=DEVICE) < missing, -1)
    plan = moe_routing.plan(ids, experts, backend="eager", **layout)
    places, groups = plan.order.numel(), -(-columns // GROUP)
    empty = partial(torch.empty, device=DEVICE)
    rows = torch.randn(places, columns, device=DEVICE, dtype=dtype)
    rows[~formula._tokens(plan)[1]] = torch.nan  # noqa: SLF001 -- which places hold a pair
    pair = plan.order.reshape(-1).clamp(max=tokens * K - 1)
    return Case(
        hidden=torch.randn(tokens, columns, device=DEVICE).to(dtype),
        plan=plan,
        token=pair // K,
        pair=pair,
        weights=torch.rand(tokens, K, device=DEVICE),
        rows=rows,
        values=empty(places, columns, dtype=FLOAT8),
        scales=empty(places, groups),
        out=empty(tokens, columns, dtype=dtype),
        grad_rows=empty(places, columns, dtype=dtype),
        grad_weights=empty(tokens, K),
    )


def kernels(launch: MoveLaunch | None, dtype: str, layout: str = "sorted") -> dict[str, Any]:
    """Return the kernels that one shape of launches has."""
    device = moe_routing.probe(DEVICE)
    problem = partial(PermuteProblem, topk=K, dtype=dtype, layout=layout)
    move = TritonPermute(problem(), device, launch)
    quantize = TritonPermute(problem(quantize="float8_e4m3fn"), device, launch)
    add = TritonCombine(CombineProblem(topk=K, dtype=dtype), device, launch)
    return {
        "permute": lambda c: move(c.hidden, c.plan, c.grad_rows),
        "quantized": lambda c: quantize(c.hidden, c.plan, c.values, scales=c.scales),
        "combine": lambda c: add(c.rows, c.plan, c.weights, c.out),
        "backward": lambda c: add.backward(
            c.hidden, c.rows, c.plan, c.weights, c.grad_rows, c.grad_weights
        ),
    }


def by_torch(c: Case, what: str) -> object:
    """Do the same by PyTorch's own operations, of a plan without empty places."""
    if what == "permute":
        return c.hidden.index_select(0, c.token)
    if what == "combine":
        rows = c.rows.index_select(0, c.plan.inverse.reshape(-1))
        return (rows.view(-1, K, rows.shape[1]) * c.weights[:, :, None].to(rows.dtype)).sum(1)
    if what == "backward":
        grad = c.hidden.index_select(0, c.token)
        weights = c.weights.reshape(-1)[c.pair]
        return grad * weights[:, None].to(grad.dtype), (grad * c.rows).sum(1)[c.plan.inverse]
    values, scales = formula.quantized(c.hidden)
    return values.view(torch.int8).index_select(0, c.token), scales.index_select(0, c.token)


def bytes_of(c: Case, what: str) -> int:
    """Return the bytes that a call has to read and write."""
    tensors = {
        "permute": (c.hidden, c.rows),
        "quantized": (c.hidden, c.values, c.scales),
        "combine": (c.rows, c.out),
        "backward": (c.hidden, c.rows, c.grad_rows),
    }
    return sum(t.nbytes for t in tensors[what])


def same(one: Tensor, other: Tensor) -> bool:
    """Compare to the bit, but for the bits of NaN."""
    one, other = one.float(), other.float()
    equal = (one == other) | (one.isnan() & other.isnan())
    return bool(equal.all())


def check(case: Case, of: dict[str, Any], said: str, *, masked: bool = False) -> None:
    """Compare all that one shape of launches computes with the formulas."""
    plan, full = case.plan, formula._tokens(case.plan)[1]  # noqa: SLF001 -- which places hold a pair
    written = full if masked else slice(None)
    case.grad_rows.fill_(7)
    of["permute"](case)
    right = {"permute": same(case.grad_rows[written], formula.permuted(case.hidden, plan)[written])}
    case.values.view(torch.uint8).fill_(7)
    of["quantized"](case)
    values, scales = (formula.permuted(t, plan)[written] for t in formula.quantized(case.hidden))
    right["scales"] = torch.equal(case.scales[written], scales)
    right["values"] = same(case.values[written], values)
    of["combine"](case)
    right["combine"] = same(case.out, formula.combined(case.rows, plan, case.weights))
    case.grad_rows.fill_(7)
    of["backward"](case)
    rows, weights = formula.combined_backward(case.hidden, case.rows, plan, case.weights)
    right["gradient of rows"] = same(case.grad_rows, rows)
    assert weights is not None  # noqa: S101 -- for mypy
    most = (case.hidden.float().norm(dim=1)[:, None] * case.rows.shape[1] ** 0.5) * 1e-5
    right["gradient of weights"] = bool(((case.grad_weights - weights).abs() <= most).all())
    wrong = [name for name, is_right in right.items() if not is_right]
    if wrong:
        sys.exit(f"{said}: wrong: {', '.join(wrong)}")


def check_all() -> None:
    """Compare in every layout, at odd widths, for every launch."""
    layouts: tuple[tuple[str, dict[str, Any]], ...] = (
        ("sorted", {}),
        ("blocks", {"block": 16}),
        ("masked", {"capacity": 8, "masked": True}),
    )
    for (name, layout), columns, dtype in itertools.product(
        layouts, (2816, 333), (torch.bfloat16, torch.float32)
    ):
        case = drawn(70, columns, 32, dtype, 0.2, **layout)
        of = kernels(None, str(dtype).removeprefix("torch."), name)
        said = f"{name}, H = {columns}, {dtype}"
        check(case, of, said, masked=name == "masked")
    for launch, (columns, experts) in itertools.product(LAUNCHES, MODELS):
        case = drawn(300, columns, experts, torch.bfloat16, 0.1)
        check(case, kernels(launch, "bfloat16"), f"{shown(launch)}, H = {columns}")


def shown(launch: MoveLaunch) -> str:
    """Name a launch: vectors, threads, and whether the next kernel is let in early."""
    return f"{launch.vectors}/{launch.threads}{'e' if launch.early else ''}"


def in_turns(cases: list[Case], call: Callable[[Case], object]) -> Callable[[], object]:
    """Return a call that takes the cases in turns."""
    turns = itertools.cycle(cases)
    return lambda: call(next(turns))


def timed(cases: list[Case], what: str, of: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return microseconds a call of each launch, of PyTorch's operations and of a copy."""
    device = torch.device(DEVICE)
    half = bytes_of(cases[0], what) // 2
    memory = [torch.empty(2, half, dtype=torch.int8, device=DEVICE) for _ in cases]
    turns = itertools.cycle(memory)
    calls: dict[str, Callable[[], object]] = {"copy": lambda: (m := next(turns))[0].copy_(m[1])}
    calls["torch"] = in_turns(cases, partial(by_torch, what=what))
    launched = {"fixed": next(iter(of.values()))} if what == "backward" else of
    calls |= {name: in_turns(cases, by_name[what]) for name, by_name in launched.items()}
    return {name: round(replayed(call, device), 2) for name, call in calls.items()}


def main() -> None:
    """Check, time, print and write."""
    torch.manual_seed(0)
    out, sizes = Path(sys.argv[1]), tuple(map(int, sys.argv[2:])) or TOKENS
    check_all()
    print("all right", flush=True)
    of = {shown(launch): kernels(launch, "bfloat16") for launch in LAUNCHES}
    print(f"{'operation':9} {'H':>5} {'T':>6}", *(f"{n:>8}" for n in ("copy", "torch", *of)))
    results = []
    for (columns, experts), tokens in itertools.product(MODELS, sizes):
        first = drawn(tokens, columns, experts, torch.bfloat16, 0)
        a_case = sum(t.nbytes for t in first if isinstance(t, torch.Tensor))
        more = max(0, min(LEAST_SETS, MOST_BYTES // a_case) - 1)
        cases = [first, *(drawn(tokens, columns, experts, torch.bfloat16, 0) for _ in range(more))]
        for what in ("permute", "quantized", "combine", "backward"):
            us = timed(cases, what, of)
            results.append(
                {"operation": what, "H": columns, "T": tokens, "us": us}
                | {"bytes": bytes_of(first, what)}
            )
            row = (f"{t:8.2f}" for t in us.values())
            print(f"{what:9} {columns:5} {tokens:6}", *row, flush=True)
        del cases, first
    what = "microseconds a call; launches: vectors/threads a program, e: the next is let in early"
    launches.write(out, what, K=K, results=results)


if __name__ == "__main__":
    main()
