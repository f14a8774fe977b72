"""What routing is worth end to end.

The model has Gemma4-26B-A4B's real shape with random bf16 weights, on one GPU.

``python benchmarks/e2e_gemma4.py run OUT.json`` builds the model on the GPU (50.5 GB, nothing is
downloaded) and times prefill and decode with a static cache at batch 1, 16 and 64, through four
routers in turn: transformers' own (stock), the algorithm of the published kernel (full sort), ours
through ``moe_routing.integrations.transformers.patch``, and one that costs nothing (free): the ids
and weights that stock gave for the very same step, from memory. It is the ceiling: what it saves is
all that routing can save. A timed decode step is the same step again and again, so that every
router sends the same tokens to the same experts and equally many experts are read. ``--tiny`` tries
the script on a CPU; ``plot IN.json OUT.png`` draws what was measured.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import statistics
import time
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch

from moe_routing.integrations.transformers import patched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

# google/gemma-4-26B-A4B's text model: 25.2 B parameters, of which 3.8 B take part in a token.
REAL = {
    "vocab_size": 262144, "hidden_size": 2816, "intermediate_size": 2112, "num_hidden_layers": 30,
    "num_attention_heads": 16, "num_key_value_heads": 8, "num_global_key_value_heads": 2,
    "head_dim": 256, "global_head_dim": 512, "sliding_window": 1024,
    "max_position_embeddings": 262144, "final_logit_softcapping": 30.0, "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "use_double_wide_mlp": False,
    "tie_word_embeddings": True, "enable_moe_block": True, "num_experts": 128, "top_k_experts": 8,
    "moe_intermediate_size": 704,
}  # fmt: skip
TINY = REAL | {
    "vocab_size": 512, "vocab_size_per_layer_input": 512, "hidden_size": 128,
    "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_global_key_value_heads": 1, "head_dim": 32,
    "global_head_dim": 64, "sliding_window": 512, "num_experts": 16, "top_k_experts": 4,
    "moe_intermediate_size": 64,
}  # fmt: skip
BATCHES, REPEATS = (1, 16, 64), 5
EXPERTS = {1: "batched_mm", 16: "grouped_mm", 64: "grouped_mm"}
"""The faster implementation of the experts for decoding.

``batched_mm`` copies the weights of every pair of token and expert.
"""
Forward = Any


class Bench:
    """The model, its routers, and the ways to route."""

    def __init__(self, *, tiny: bool) -> None:
        """Build the model."""
        from transformers import Gemma4ForCausalLM, Gemma4TextConfig

        self.device = "cpu" if tiny else "cuda"
        self.prompt, self.steps = (16, 3) if tiny else (256, 20)
        self.config = Gemma4TextConfig(**(TINY if tiny else REAL))
        torch.manual_seed(0)
        with torch.device(self.device):
            self.model: nn.Module = Gemma4ForCausalLM._from_config(  # noqa: SLF001 -- AutoModel has no class for a text configuration
                self.config,
                dtype=torch.bfloat16,
                attn_implementation="sdpa",
                experts_implementation="grouped_mm",
            )
        self.model.eval().requires_grad_(requires_grad=False)
        self.routers = [
            module for module in self.model.modules() if type(module).__name__ == "Gemma4TextRouter"
        ]
        # Logits of about N(0, 1), so that routing is neither uniform nor always the same.
        for router in self.routers:
            router.proj.weight.normal_()
            router.per_expert_scale.uniform_(0.5, 1.5)
        self.given: dict[int, tuple[Tensor, Tensor]] = {}
        self.names = ("stock", "ours", "free") if tiny else ("stock", "full sort", "ours", "free")

    @contextmanager
    def routed(self, name: str) -> Iterator[None]:
        """Route by that router inside the block."""
        if name == "ours":
            with patched(self.model) as report:
                if report.left:
                    raise RuntimeError(str(report))
                yield
            return
        forward = {
            "stock": None,
            "full sort": full_sort_forward,
            "free": self.free,
            "recording": self.record,
        }[name]
        for router in self.routers if forward else ():
            router.forward = MethodType(forward, router)
        try:
            yield
        finally:
            for router in self.routers if forward else ():
                del router.forward

    def record(self, router: Forward, hidden: Tensor) -> tuple[Tensor, ...]:
        """Route as stock does, and keep what it gave for ``free``."""
        probabilities, weights, ids = type(router).forward(router, hidden)
        self.given[id(router)] = (weights, ids)
        return probabilities, weights, ids

    def free(self, router: Forward, hidden: Tensor) -> tuple[Tensor, ...]:
        """Compute the logits, and route by what was kept."""
        return logits_of(router, hidden), *self.given[id(router)]


def logits_of(router: Forward, hidden: Tensor) -> Tensor:
    """Compute the logits as Gemma4's router does."""
    logits: Tensor = router.proj(router.norm(hidden) * router.scale * router.scalar_root_size)
    return logits


def full_sort_forward(router: Forward, hidden: Tensor) -> tuple[Tensor, ...]:
    """Route as the published kernel does, in one launch behind the projection.

    Its ids are int64, as stock returns them.
    """
    from full_sort import full_sort

    logits = logits_of(router, hidden)
    shape = (len(hidden), router.config.top_k_experts)
    weights, ids = (
        hidden.new_empty(shape, dtype=torch.float32),
        hidden.new_empty(shape, dtype=torch.int64),
    )
    full_sort(logits, shape[1], router.per_expert_scale, (weights, ids))
    return logits, weights, ids


class Decoder:
    """Prefill, and one decode step over static tensors, at one batch size.

    A step has no host synchronisation.
    """

    def __init__(self, bench: Bench, batch: int) -> None:
        """Make the cache and the static tensors."""
        from transformers.cache_utils import StaticCache

        self.bench, self.model, device = bench, bench.model, bench.device
        length = -(-(bench.prompt + 2 * bench.steps + 8) // 8) * 8
        if length > bench.config.sliding_window:
            most = bench.config.sliding_window
            msg = f"length: expected at most the sliding window of {most}, got {length}"
            raise ValueError(msg)
        self.cache = StaticCache(config=bench.config, max_cache_len=length)
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(
            3, bench.config.vocab_size, (batch, bench.prompt), generator=generator
        ).to(device)
        self.token = self.tokens[:, :1].clone()
        self.next = torch.zeros_like(self.token)
        self.position = torch.full((1, 1), bench.prompt, dtype=torch.long, device=device)
        self.mask = (torch.arange(length, device=device) <= bench.prompt).view(1, 1, 1, -1)

    def prefill(self) -> None:
        """Fill the cache with the prompt."""
        self.cache.reset()
        output = self.model(
            input_ids=self.tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        self.token.copy_(output.logits[:, -1].argmax(-1, keepdim=True))

    def rewind(self) -> None:
        """Set the cache back to the prompt's end, where every step of a block begins."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.bench.prompt)

    def step(self) -> None:
        """Decode the token behind the prompt.

        The next one is computed and not fed back, so all steps are alike.
        """
        for layer in self.cache.layers:  # a Python count that picks a branch; it must not run on
            if hasattr(layer, "cumulative_length_int"):
                layer.cumulative_length_int = self.bench.prompt
        output = self.model(
            input_ids=self.token, position_ids=self.position, past_key_values=self.cache,
            use_cache=True,
            attention_mask={"full_attention": self.mask, "sliding_attention": self.mask},
        )  # fmt: skip
        self.next.copy_(output.logits[:, -1].argmax(-1, keepdim=True))

    def captured(self) -> Callable[[], None]:
        """Capture a step in a CUDA graph and return its replay."""
        self.rewind()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph.replay


def milliseconds(device: str, call: Callable[[], None], times: int) -> float:
    """Return the mean time of a call in a block of calls, on the device's clock."""
    if device == "cpu":
        begin = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - begin) * 1e3 / times
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(times):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / times


def alternate(names: tuple[str, ...], block: Callable[[str], float]) -> dict[str, list[float]]:
    """Time a block of each router in turn, five times, each time beginning with another."""
    times: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(REPEATS):
        for name in (names[(index + repeat) % len(names)] for index in range(len(names))):
            times[name].append(round(block(name), 5))
    return times


def judged(times: dict[str, list[float]], **about: object) -> dict[str, Any]:
    """Sum up a stage: medians, spread, time saved, and the share of routing in a step.

    The share is given for each way to route.
    """
    median = {name: statistics.median(values) for name, values in times.items()}
    ceiling = median["stock"] - median["free"]
    row: dict[str, Any] = {
        **about,
        "ms": times,
        "median_ms": median,
        "spread_percent": {
            name: round(100 * (max(v) - min(v)) / median[name], 3) for name, v in times.items()
        },
        "less_than_stock_percent": {
            name: round(100 * (1 - m / median["stock"]), 3) for name, m in median.items()
        },
        "of_the_ceiling_percent": {
            name: round(100 * (median["stock"] - m) / ceiling, 1) for name, m in median.items()
        },
        "routing_share_percent": {
            name: round(100 * (1 - median["free"] / m), 3) for name, m in median.items()
        },
    }
    cells = "  ".join(f"{name} {m:.4f}" for name, m in median.items())
    of = row["of_the_ceiling_percent"]
    share = row["routing_share_percent"]
    print(
        f"{about} ms: {cells} | of the ceiling: {of} | routing's share: {share} | "
        f"spread: {row['spread_percent']}",
        flush=True,
    )
    return row


def graph_decode(bench: Bench, decoder: Decoder) -> dict[str, list[float]]:
    """Time decode steps in CUDA graphs, captured anew for each block.

    Where a capture lays its memory may cost time too.
    """

    def block(name: str) -> float:
        with bench.routed(name):
            replay = decoder.captured()
        decoder.rewind()
        for _ in range(2):
            replay()
        return milliseconds(bench.device, replay, bench.steps)

    return alternate(bench.names, block)


def eager_decode(bench: Bench, decoder: Decoder) -> dict[str, list[float]]:
    """Time decode steps launched from Python."""

    def block(name: str) -> float:
        decoder.rewind()
        with bench.routed(name):
            decoder.step()
            return milliseconds(bench.device, decoder.step, max(2, bench.steps // 6))

    return alternate(bench.names, block)


def prefill(bench: Bench, decoder: Decoder) -> dict[str, list[float]]:
    """Time prefills launched from Python."""

    def block(name: str) -> float:
        with bench.routed(name):
            decoder.prefill()
            return milliseconds(bench.device, decoder.prefill, 2)

    return alternate(bench.names, block)


def agreement(bench: Bench, decoder: Decoder) -> dict[str, Any]:
    """Compare our routing with stock, layer by layer on the same input.

    Rows that differ must be ties.
    """
    inputs: list[tuple[Forward, Tensor]] = []
    hooks = [
        r.register_forward_pre_hook(lambda router, args: inputs.append((router, args[0].clone())))
        for r in bench.routers
    ]
    decoder.prefill()
    for hook in hooks:
        hook.remove()
    found = {
        "layers": len(inputs),
        "rows": 0,
        "ties": 0,
        "wrong": 0,
        "largest_weight_difference": 0.0,
    }
    for router, hidden in inputs:
        _, weights, ids = router(hidden)
        with bench.routed("ours"):
            _, our_weights, our_ids = router(hidden)
        logits = logits_of(router, hidden).float()
        same = (ids.sort(-1).values == our_ids.sort(-1).values).all(-1)
        tie = (
            logits.gather(1, ids).sort(-1).values == logits.gather(1, our_ids).sort(-1).values
        ).all(-1) & ~same
        dense, our_dense = (
            torch.zeros_like(logits).scatter(1, i, w)
            for i, w in ((ids, weights), (our_ids, our_weights))
        )
        found["rows"] += len(hidden)
        found["ties"] += int(tie.sum())
        found["wrong"] += int((~same & ~tie).sum())
        difference = (dense - our_dense)[same].abs().max()
        found["largest_weight_difference"] = max(
            found["largest_weight_difference"], float(difference)
        )
    print(f"agreement on the same logits: {found}", flush=True)
    if found["wrong"]:
        raise RuntimeError(str(found))
    return found


def run(out: Path, *, tiny: bool) -> None:
    """Measure everything; the file is written after each stage."""
    import transformers

    begin = time.perf_counter()
    bench = Bench(tiny=tiny)
    result: dict[str, Any] = {
        "what": "end to end: Gemma4-26B-A4B's shape, random bf16 weights"
        + (", TINY: a trial of the script" if tiny else ""),
        "date": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "device": "cpu" if tiny else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "parameters": sum(parameter.numel() for parameter in bench.model.parameters()),
        "prompt": bench.prompt,
        "rows": [],
    }
    if not tiny:
        import triton

        result["triton"] = triton.__version__
    print(f"built in {time.perf_counter() - begin:.1f} s: {result}", flush=True)
    batches = (1, 2) if tiny else BATCHES
    decoders = {batch: Decoder(bench, batch) for batch in batches}

    def keep(
        stage: str,
        batch: int,
        measure: Callable[[Bench, Decoder], dict[str, list[float]]],
        experts: str,
    ) -> None:
        bench.model.set_experts_implementation(experts)
        about = {"stage": stage, "batch": batch, "experts": experts}
        result["rows"].append(judged(measure(bench, decoders[batch]), **about))
        result["seconds"] = round(time.perf_counter() - begin, 1)
        out.write_text(json.dumps(result, indent=1) + "\n")

    def record(batch: int, experts: str) -> None:
        bench.model.set_experts_implementation("grouped_mm")
        decoders[batch].prefill()
        bench.model.set_experts_implementation(experts)
        with bench.routed("recording"):
            decoders[batch].step()
        ids = torch.stack([bench.given[id(router)][1].flatten() for router in bench.routers])
        experts_used = statistics.mean(len(row.unique()) for row in ids)
        print(f"batch {batch}: {experts_used:.1f} experts a layer", flush=True)

    with torch.no_grad():
        decoders[batches[0]].prefill()
        result["agreement"] = agreement(bench, decoders[batches[0]])
        for batch in () if tiny else batches:
            record(batch, EXPERTS.get(batch, "grouped_mm"))
            keep("graph decode", batch, graph_decode, EXPERTS.get(batch, "grouped_mm"))
        for batch, decoder in reversed(decoders.items()):
            bench.model.set_experts_implementation("grouped_mm")
            with bench.routed("recording"):
                decoder.prefill()
            keep("prefill", batch, prefill, "grouped_mm")
        for batch in batches:
            record(batch, EXPERTS.get(batch, "grouped_mm"))
            keep("eager decode", batch, eager_decode, EXPERTS.get(batch, "grouped_mm"))
    print(f"done in {result['seconds']} s", flush=True)


def plot(source: Path, out: Path) -> None:
    """Draw what routing costs in a step of graph decode, and what each router saves of it."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    measured = json.loads(source.read_text())
    rows = [row for row in measured["rows"] if row["stage"] == "graph decode"]
    colours = {"stock": "#9e9e9e", "full sort": "#f4a261", "ours": "#2a9d8f", "free": "#264653"}
    labels = {
        "stock": "transformers' own",
        "full sort": "full sort",
        "ours": "ours",
        "free": "a router that costs nothing",
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for axes, key, names, title in (
        (
            left,
            "less_than_stock_percent",
            ("full sort", "ours", "free"),
            "Decode step: less time than transformers' own, %",
        ),
        (
            right,
            "routing_share_percent",
            ("stock", "full sort", "ours"),
            "Share of routing in a decode step, %",
        ),
    ):
        for offset, name in enumerate(names):
            bars = axes.bar(
                [index + 0.27 * (offset - 1) for index in range(len(rows))],
                [row[key][name] for row in rows],
                0.25,
            )
            for bar in bars:
                bar.set_color(colours[name])
            bars.set_label(labels[name])
            axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
        axes.set_xticks(range(len(rows)), [f"batch {row['batch']}" for row in rows])
        axes.set_title(title, fontsize=10)
        axes.margins(y=0.15)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    figure.suptitle(f"Gemma4-26B-A4B's shape, CUDA-graph decode, {measured['device']}", fontsize=11)
    figure.savefig(out, dpi=150)


def main() -> None:
    """Run or plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="measure")
    running.add_argument("out", type=Path, metavar="OUT.json")
    running.add_argument(
        "--tiny", action="store_true", help="a small model on the CPU, to try the script"
    )
    drawing = commands.add_parser("plot", help="draw what was measured")
    drawing.add_argument("source", type=Path, metavar="IN.json")
    drawing.add_argument("out", type=Path, metavar="OUT.png")
    said = parser.parse_args()
    if said.command == "run":
        run(said.out, tiny=said.tiny)
    else:
        plot(said.source, said.out)


if __name__ == "__main__":
    main()
