"""Time sending tokens to the ranks of their experts and back, ours and transformers'.

    torchrun --nproc-per-node 2 benchmarks/exchange.py OUT.json [TOKENS ...]

Microseconds of ``ExpertParallel.dispatch`` and ``combine``, with experts that change nothing
between them, on one machine; the slowest rank's median. ``rows`` is ``dispatch_rows`` and
``combine_rows``, which leave the order of experts to them; ``exchanges alone`` is without a plan,
an order and sums. ``eager`` is a call with the host's part, one after the other; ``graph`` the
replay of a CUDA graph of several. For comparison transformers' ``AllToAllEP``, where it is
installed (5.23 on), on the same ranks and tokens; NCCL's all-to-all of as many bytes there and
back; and what a rank needs to write as many bytes into the next rank's memory as the busiest rank
writes or gets. Everything is compared with the sum on one rank first.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import launches
import torch
import torch.distributed._symmetric_memory as symmetric
from torch import distributed

from moe_routing.distributed import ExpertParallel, Tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from torch._C._distributed_c10d import _SymmetricMemory

K = 8
MODELS = ((2816, 128), (7168, 256))
"""Columns and experts: Gemma4's and DeepSeek-V3's."""
TOKENS = (1, 16, 64, 512, 4096)
"""Of each rank."""
RUNS, CALLS = 20, 8
"""Medians are of so many runs, each of so many calls."""
HEAD_START = 2_000_000
"""Cycles that the GPUs are busy for before ranks meet: about a millisecond, more than the hosts are
apart."""


class Case(NamedTuple):
    """What a rank dispatches, and what comes back where experts change nothing."""

    hidden: Tensor
    ids: Tensor
    weights: Tensor
    right: Tensor


def drawn(tokens: int, columns: int, experts: int) -> Case:
    """Draw tokens of this rank."""
    hidden = torch.randn(tokens, columns, device="cuda").bfloat16()
    ids = torch.rand(tokens, experts, device="cuda").topk(K).indices.int()
    weights = torch.rand(tokens, K, device="cuda")
    return Case(hidden, ids, weights, hidden.float() * weights.sum(1, keepdim=True))


def ours(ep: ExpertParallel, case: Case) -> Tensor:
    """Exchange there and back, ordered by expert between."""
    rows, _ = ep.dispatch(*case[:3])
    return ep.combine(rows)


def ours_by_rows(ep: ExpertParallel, case: Case) -> Tensor:
    """Exchange there and back; where sums are made on each rank, that sum is made too."""
    received = ep.dispatch_rows(*case[:3])
    rows = received.rows
    if received.weights is not None:
        here = torch.where(received.ids >= 0, received.weights, 0.0).sum(1, keepdim=True)
        rows = (rows.float() * here).to(rows.dtype)
    return ep.combine_rows(rows, received)


def alone(ep: ExpertParallel, case: Case) -> Tensor:
    """Exchange there and back, without a plan, an order, or sums."""
    transport = ep._exchange  # noqa: SLF001 -- what is timed is inside
    received = transport.dispatch(Tokens(*case[:3]))
    back: Tensor = transport.back(received.rows, received.state, received.ids, None)  # type: ignore[attr-defined] # of this transport
    return back


class OneMesh(NamedTuple):
    """What ``AllToAllEP`` asks of the meshes: here that of the experts, or of this rank alone."""

    group: Any
    ranks: int

    def get_group(self) -> Any:  # noqa: ANN401 -- a process group
        """Return the group."""
        return self.group

    def size(self) -> int:
        """Return the number of its ranks."""
        return self.ranks


def theirs(experts: int) -> Callable[[Case], Tensor] | None:
    """Return transformers' exchange, if it is installed."""
    try:
        from transformers.distributed.expert_parallel import AllToAllEP
    except ImportError:
        return None
    made = AllToAllEP.__new__(AllToAllEP)
    ranks = distributed.get_world_size()
    made.ep_mesh, made.tp_mesh = OneMesh(distributed.group.WORLD, ranks), OneMesh(None, 1)
    made.num_local_experts = experts // ranks
    made.experts_forward = lambda rows, _ids, _weights: rows

    def call(case: Case) -> Tensor:
        out: Tensor = made(case.hidden, case.ids.long(), case.weights)
        return out

    return call


def must_be_right(name: str, made: Tensor, case: Case) -> None:
    """Require the weighted sums, within a few roundings of bfloat16."""
    off = (made.float() - case.right).abs().max() / case.right.abs().max()
    if not off < 0.02:  # noqa: PLR2004 -- 2**-8, a few times
        msg = f"{name}: off by {float(off)}"
        raise SystemExit(msg)


def eager(call: Callable[[], object]) -> list[float]:
    """Return microseconds a call, the host's part among them."""
    times = []
    for _ in range(RUNS):
        distributed.barrier()
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begun) / CALLS * 1e6)
    return times


def graph(call: Callable[[], object]) -> list[float]:
    """Return microseconds a call in the replays of a graph.

    Hosts launch replays at different times, tens of microseconds apart. A rank that begins early
    would wait in its first exchange for the others, so ranks meet on their devices first.
    """
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for _ in range(CALLS):
            call()
    for _ in range(3):
        captured.replay()
    times = []
    for _ in range(RUNS):
        distributed.barrier()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(HEAD_START)  # noqa: SLF001 -- no other call keeps a GPU busy for a time
        meeting().barrier()
        first.record()
        captured.replay()
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last) / CALLS * 1e3)
    return times


@cache
def meeting() -> _SymmetricMemory:
    """Return what lets all ranks' devices wait for each other."""
    device = torch.device("cuda", torch.cuda.current_device())
    one = symmetric.empty(1, dtype=torch.int32, device=device)
    return symmetric.rendezvous(one, distributed.group.WORLD)


def slowest(times: list[float]) -> dict[str, float]:
    """Return the median and spread of the slowest rank."""
    quartiles = statistics.quantiles(times, n=4)
    heard = [(0.0, 0.0, 0.0)] * distributed.get_world_size()
    distributed.all_gather_object(heard, (quartiles[1], quartiles[0], quartiles[2]))
    median, low, high = max(heard)
    return {"microseconds": round(median, 2), "low": round(low, 2), "high": round(high, 2)}


class Timed(NamedTuple):
    """What is timed: a way to exchange.

    :ivar right: whether its results are sums, which are checked.
    :ivar eager: whether it is timed with the host's part.
    """

    name: str
    call: Callable[[], Tensor]
    capturable: bool = True
    right: bool = True
    eager: bool = True


def ways(case: Case, experts: int) -> list[Timed]:
    """Return every way to exchange, of one size."""
    tokens, columns = case.hidden.shape
    found = []
    for transport, reduce, most in (
        *(("all-to-all", reduce, most) for reduce in ("none", "rank") for most in (None, tokens)),
        *(("symmetric", reduce, tokens) for reduce in ("none", "rank")),
    ):
        ep = ExpertParallel(None, experts, reduce=reduce, max_tokens=most, transport=transport)  # type: ignore[arg-type] # one of two
        name = f"{transport} reduce={reduce}" + (" padded" if most else "")
        found.append(Timed(name, partial(ours, ep, case), bool(most)))
        if not most:
            continue
        by_rows = partial(ours_by_rows, ep, case)
        found.append(Timed(f"{name}, rows", by_rows, eager=False))
        if transport == "symmetric":
            only = partial(alone, ep, case)
            found.append(Timed(f"{name}, exchanges alone", only, right=False, eager=False))
    other = theirs(experts)
    if other is not None:
        found.append(Timed("transformers all_to_all", partial(other, case), capturable=False))
    ranks = distributed.get_world_size()
    pairs = -(-tokens * K // ranks) * ranks
    there, back = torch.zeros(2, pairs, columns, dtype=torch.bfloat16, device="cuda")

    def plainly() -> Tensor:
        distributed.all_to_all_single(back, there)
        distributed.all_to_all_single(there, back)
        return back

    found.append(Timed("NCCL all-to-all, even", plainly, right=False, eager=False))
    return [*found, Timed("put", put(most_rows(case, experts), columns), right=False, eager=False)]


def most_rows(case: Case, experts: int) -> int:
    """Return the rows for other ranks that the busiest rank writes, or gets."""
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    there = torch.bincount(case.ids.flatten() // (experts // ranks), minlength=ranks)
    there[rank] = 0
    written = [torch.empty_like(there) for _ in range(ranks)]
    distributed.all_gather(written, there)
    rows = torch.stack(written)
    return max(int(rows.sum(0).max()), int(rows.sum(1).max()))


def put(rows: int, columns: int) -> Callable[[], Tensor]:
    """Return what writes so many rows into the next rank's memory."""
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    device = torch.device("cuda", torch.cuda.current_device())
    own = symmetric.empty(rows * columns, dtype=torch.bfloat16, device=device)
    handle = symmetric.rendezvous(own, distributed.group.WORLD)
    its = handle.get_buffer((rank + 1) % ranks, [rows, columns], torch.bfloat16)
    source = torch.zeros(rows, columns, dtype=torch.bfloat16, device=device)

    def written(_kept: object = (own, handle)) -> Tensor:
        return torch.neg(source, out=its)

    return written


def rows_of(tokens: int, columns: int, experts: int) -> list[dict[str, Any]]:
    """Time every way to exchange, of one size."""
    case = drawn(tokens, columns, experts)
    found = []
    with torch.no_grad():
        for name, call, capturable, right, hosted in ways(case, experts):
            made = call()
            if right:
                must_be_right(name, made, case)
            timers = [("eager", eager)] * hosted + [("graph", graph)] * capturable
            for how, timed in timers:
                row = {"name": name, "how": how, "tokens": tokens, "hidden_size": columns}
                found.append(row | slowest(timed(call)))
                if distributed.get_rank() == 0:
                    print(*found[-1].values(), flush=True)
    return found


def main(out: Path, tokens: list[int]) -> None:
    """Time all sizes, and write them down."""
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("cpu:gloo,cuda:nccl")
    torch.manual_seed(distributed.get_rank())
    found = []
    for columns, experts in MODELS:
        for number in tokens:
            found += rows_of(number, columns, experts)
    if distributed.get_rank() == 0:
        what = "microseconds there and back of the slowest rank: its median and quartiles"
        launches.write(out, what, ranks=distributed.get_world_size(), K=K, results=found)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(text) for text in sys.argv[2:]] or list(TOKENS))
