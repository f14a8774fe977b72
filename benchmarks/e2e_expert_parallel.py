"""What moving tokens to experts on other GPUs costs end to end, in Gemma4's shape.

    torchrun --nproc-per-node 2 benchmarks/e2e_expert_parallel.py OUT.json [--batches 1,16,64]

Every rank has the whole attention and 1 / n of the experts, with random bf16 weights. Decode steps
and prefills of ``batch`` sequences a rank are timed in these ways: our ``symmetric`` with rows
that come back summed (``rank``) and not (``none``), our ``all-to-all``, transformers'
``all_to_all``, and transformers' ``all_reduce``, for which every rank holds the sequences of all.
Decode steps are replays of CUDA graphs where a way can be captured, else calls. Times are the
slowest rank's.

Before anything is timed, every layer's results are compared with those of one rank that has all
experts, for the same hidden states. (Logits are not: routers of random weights amplify the last
bits.) ``--tiny`` tries the script on CPUs, without ``symmetric``.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import statistics
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from e2e_gemma4 import Bench, Decoder, milliseconds
from exchange import OneMesh
from torch import distributed, nn
from transformers.distributed.expert_parallel import AllReduceEP, AllToAllEP
from transformers.integrations.moe import _grouped_linear

from moe_routing.distributed import ExpertParallel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

REPEATS = 5
CALLS = 3
"""Of a block of decode steps that are no graphs: the host's part of one takes long."""
PREFILLS = (1, 16)
"""Sequences of a rank."""
LARGEST_DIFFERENCE = 0.01
"""Of a layer's bfloat16 results from those of one rank, by norm.

Sums in another order, rounded to bfloat16 on each rank, give 0.003 to 0.004. Experts of the wrong
rank give about 1.4.
"""


class Way(NamedTuple):
    """A way to bring tokens to experts.

    :ivar shared: every rank has the sequences of all.
    :ivar captured: a CUDA graph can hold it.
    """

    name: str
    shared: bool = False
    captured: bool = False
    transport: str = ""
    reduce: str = "none"


WAYS = (
    Way("symmetric, rank", captured=True, transport="symmetric", reduce="rank"),
    Way("symmetric, none", captured=True, transport="symmetric"),
    Way("all-to-all, none", transport="all-to-all"),
    Way("transformers all_to_all"),
    Way("transformers all_reduce", shared=True, captured=True),
)
FILLS = WAYS[2]
"""Fills the cache before decode steps: it needs no most of tokens."""


def mine(experts: Any, rank: int, ranks: int) -> None:  # noqa: ANN401 -- a module of transformers
    """Leave a layer's experts of this rank in memory, and no others."""
    every = experts.num_experts
    each = every // ranks
    for name, weights in list(experts.named_parameters(recurse=False)):
        if weights.shape[0] == every:
            own = weights[rank * each : (rank + 1) * each].clone()
            setattr(experts, name, nn.Parameter(own, requires_grad=False))
    experts.num_experts = each
    experts._is_expert_parallel = True  # noqa: SLF001 -- what transformers sets where it splits them


def by_plan(
    ep: ExpertParallel,
    experts: Any,  # noqa: ANN401 -- likewise
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
) -> Tensor:
    """Compute experts between our dispatch and combine."""
    rows, plan = ep.dispatch(hidden, ids, weights)
    ends = plan.offsets[1:]
    rows = _grouped_linear(rows, experts.gate_up_proj, ends, is_transposed=experts.is_transposed)
    rows = experts._apply_gate(rows)  # noqa: SLF001 -- as transformers' experts do
    rows = _grouped_linear(rows, experts.down_proj, ends, is_transposed=experts.is_transposed)
    return ep.combine(rows)


def theirs(kind: type, experts: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:  # noqa: ANN401 -- likewise
    """Return transformers' way, for a layer."""
    made: Any = kind.__new__(kind)
    made.ep_mesh = _Mesh(distributed.group.WORLD, distributed.get_world_size())
    made.tp_mesh = OneMesh(None, 1)
    made.num_local_experts = experts.num_experts
    made.experts_forward = partial(type(experts).forward, experts)

    def call(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out: Tensor = made(hidden, ids, weights.to(hidden.dtype))  # else results are float32
        return out

    return call


class _Mesh(OneMesh):
    def get_local_rank(self) -> int:
        return distributed.get_rank()


class Ranks:
    """The model on all ranks."""

    def __init__(self, *, tiny: bool) -> None:
        """Build it whole, record what its layers make of a prompt, and split its experts."""
        self.bench = Bench("gemma4", tiny=tiny)
        self.rank, self.ranks = distributed.get_rank(), distributed.get_world_size()
        self.ways = tuple(way for way in WAYS if not tiny or way.transport != "symmetric")
        self.seen = self.recorded()
        for experts in self.bench.experts:
            mine(experts, self.rank, self.ranks)
        if not tiny:
            torch.cuda.empty_cache()

    def decoder(self, batch: int, *, shared: bool) -> Decoder:
        """Return what decodes this rank's sequences, or those of all ranks."""
        made = Decoder(self.bench, batch * self.ranks if shared else batch)
        generator = torch.Generator().manual_seed(2)
        size = (self.ranks, batch, self.bench.prompt)
        drawn = torch.randint(3, self.bench.config.vocab_size, size, generator=generator)
        made.tokens.copy_(drawn.flatten(0, 1) if shared else drawn[self.rank])
        made.token.copy_(made.tokens[:, :1])
        return made

    def recorded(self) -> list[tuple[Tensor, ...]]:
        """Return what each layer's experts get and make, as one rank computes a prompt."""
        seen = []

        def record(_experts: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
            seen.append((*given, made))

        hooks = [experts.register_forward_hook(record) for experts in self.bench.experts]
        decoder = self.decoder(2, shared=False)
        self.bench.model(input_ids=decoder.tokens, use_cache=False, logits_to_keep=1)
        for hook in hooks:
            hook.remove()
        return seen

    def of_all(self, part: Tensor) -> Tensor:
        """Return every rank's rows, by rank."""
        parts = [torch.empty_like(part) for _ in range(self.ranks)]
        distributed.all_gather(parts, part.contiguous())
        return torch.cat(parts)

    @contextmanager
    def through(self, way: Way, tokens: int) -> Iterator[None]:
        """Bring tokens to experts in this way, of at most so many a rank."""
        ep = None
        if way.transport:
            ep = ExpertParallel(
                None,
                self.bench.experts[0].num_experts * self.ranks,
                reduce=way.reduce,  # type: ignore[arg-type] # one of two
                max_tokens=tokens if way.captured else None,
                transport=way.transport,
            )
        for experts in self.bench.experts:
            if ep is not None:
                experts.forward = partial(by_plan, ep, experts)
            else:
                experts.forward = theirs(AllReduceEP if way.shared else AllToAllEP, experts)
        try:
            yield
        finally:
            for experts in self.bench.experts:
                del experts.forward

    def must_be_right(self) -> dict[str, float]:
        """Compare every layer with one rank; return the largest differences by norm."""
        found = {}
        for way in self.ways:
            tokens = len(self.seen[0][0])
            worst = 0.0
            with self.through(way, tokens):
                for experts, (*given, right) in zip(self.bench.experts, self.seen, strict=True):
                    made = experts(
                        *([self.of_all(part) for part in given] if way.shared else given)
                    )
                    if way.shared:
                        made = made.unflatten(0, (self.ranks, tokens))[self.rank]
                    off = (made - right).float().norm() / right.float().norm()
                    worst = max(worst, float(off))
            found[way.name] = max(self.heard(worst))
        if not max(found.values()) < LARGEST_DIFFERENCE:
            msg = f"expected differences of at most {LARGEST_DIFFERENCE}, got {found}"
            raise RuntimeError(msg)
        return found

    def heard(self, said: float) -> list[float]:
        """Return what every rank says."""
        heard = [0.0] * self.ranks
        distributed.all_gather_object(heard, said)
        return heard

    def timed(self, way: Way, stage: str, batch: int) -> list[float]:
        """Return milliseconds of blocks of steps or of prefills, the slowest rank's each."""
        bench, decoder = self.bench, self.decoder(batch, shared=way.shared)
        most = decoder.tokens.numel() if stage == "prefill" else len(decoder.tokens)
        times = []
        if stage != "prefill":
            with self.through(FILLS, 0):
                decoder.prefill()
        with self.through(way, most):
            call: Callable[[], None] = decoder.prefill
            number = 1
            if stage != "prefill":
                decoder.rewind()
                graph = way.captured and bench.device == "cuda"
                call = decoder.captured() if graph else decoder.step
                number = bench.steps if graph else CALLS
                decoder.rewind()
            for _ in range(2):
                call()
            for _ in range(REPEATS):
                decoder.rewind()
                distributed.barrier()
                times.append(max(self.heard(milliseconds(bench.device, call, number))))
        return times


def main(out: Path, batches: list[int], *, tiny: bool) -> None:
    """Measure, and write down after each stage."""
    if tiny:
        distributed.init_process_group("gloo")
    else:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("cpu:gloo,cuda:nccl")
    with torch.no_grad():
        model = Ranks(tiny=tiny)
        result: dict[str, Any] = {
            "what": f"milliseconds: {model.bench.shape.what}'s shape, experts on all ranks",
            "device": "cpu" if tiny else torch.cuda.get_device_name(),
            "with": f"torch {torch.__version__}",
            "date": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
            "ranks": model.ranks,
            "prompt": model.bench.prompt,
            "layers_differ_by": model.must_be_right(),
            "results": [],
        }
        stages = [("decode", batch) for batch in batches] + [("prefill", n) for n in PREFILLS]
        for stage, batch in stages:
            for way in model.ways:
                times = model.timed(way, stage, batch)
                row = {
                    "name": way.name,
                    "stage": stage,
                    "batch": batch,
                    "median_ms": statistics.median(times),
                    "ms": times,
                }
                result["results"].append(row)
                if model.rank == 0:
                    print(*list(row.values())[:4], flush=True)
                    out.write_text(json.dumps(result, indent=1))
    distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # graphs with NCCL's calls are left, which ending a group would wait for


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--batches", default="1,16,64")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    main(given.out, [int(text) for text in given.batches.split(",")], tiny=given.tiny)
