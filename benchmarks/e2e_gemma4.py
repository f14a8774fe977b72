"""What routing and the moves of tokens to experts are worth end to end.

Models of real shapes with random bf16 weights, on one GPU; nothing is downloaded.

``python benchmarks/e2e_gemma4.py run OUT.json [--model NAME] [--batches 1,16,64]`` builds the model
on the GPU and times decode in CUDA graphs, with a static cache, and prefill, in five ways:
transformers' own code (stock), the algorithm of the published routing kernel (full sort), our
routing through ``patch`` (routing), and our routing with plan, permute and combine through
``patch(experts=True)`` (block), and that with the routers' logits by ``patch(experts=True,
gate=True)`` (gate). A timed decode step is the same step again and again, so that every
way sends the same tokens to the same experts and equally many experts are read.

The routers and the experts of some layers are timed alone too, in each way and on what they got
in that very step. Their times predict a step's: stock's, plus what the pieces of all layers take
more or less. Before anything is timed, routing, gate and one layer's experts are compared with
stock. ``--tiny`` tries the script on a CPU; ``plot IN.json OUT.png`` draws what was measured.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import statistics
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch

from moe_routing import combine, permute, plan
from moe_routing.integrations.transformers import patched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor, nn

Forward = Any


def gemma_logits(router: Forward, hidden: Tensor) -> Tensor:
    """Compute the logits as Gemma4's router does."""
    logits: Tensor = router.proj(router.norm(hidden) * router.scale * router.scalar_root_size)
    return logits


def linear_logits(router: Forward, hidden: Tensor) -> Tensor:
    """Compute the logits as Qwen3's and gpt-oss' routers do."""
    return torch.nn.functional.linear(hidden, router.weight, getattr(router, "bias", None))


@dataclass(frozen=True)
class Shape:
    """A model to build.

    :ivar what: whose shape it is.
    :ivar classes: of transformers: the model's and the configuration's.
    :ivar router: the class of its routers.
    :ivar logits: computes what a router routes.
    :ivar attention: the implementation that the class has and that can be captured.
    :ivar real: the configuration.
    :ivar tiny: what ``--tiny`` changes.
    """

    what: str
    classes: tuple[str, str]
    router: str
    logits: Callable[[Forward, Tensor], Tensor]
    attention: str
    real: Mapping[str, Any]
    tiny: Mapping[str, Any]


TINY = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "moe_intermediate_size": 64,
}  # fmt: skip
SHAPES = {
    # The text model: 25.2 B parameters, of which 3.8 B take part in a token; 50.5 GB.
    "gemma4": Shape(
        "Gemma4-26B-A4B", ("Gemma4ForCausalLM", "Gemma4TextConfig"), "Gemma4TextRouter",
        gemma_logits, "sdpa",
        {
            "vocab_size": 262144, "hidden_size": 2816, "intermediate_size": 2112,
            "num_hidden_layers": 30, "num_attention_heads": 16, "num_key_value_heads": 8,
            "num_global_key_value_heads": 2, "head_dim": 256, "global_head_dim": 512,
            "sliding_window": 1024, "max_position_embeddings": 262144,
            "final_logit_softcapping": 30.0, "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
            "use_double_wide_mlp": False, "tie_word_embeddings": True, "enable_moe_block": True,
            "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704,
        },
        TINY | {
            "vocab_size_per_layer_input": 512, "num_hidden_layers": 6,
            "num_global_key_value_heads": 1, "global_head_dim": 64, "num_experts": 16,
            "top_k_experts": 4,
        },
    ),
    # 30.5 B parameters, 61 GB.
    "qwen3": Shape(
        "Qwen3-30B-A3B", ("Qwen3MoeForCausalLM", "Qwen3MoeConfig"), "Qwen3MoeTopKRouter",
        linear_logits, "sdpa",
        {
            "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
            "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
            "head_dim": 128, "max_position_embeddings": 40960, "tie_word_embeddings": False,
            "norm_topk_prob": True, "num_experts": 128, "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        TINY | {"num_hidden_layers": 4, "num_experts": 16, "num_experts_per_tok": 4},
    ),
    # 20.9 B parameters, 42 GB. Its window is 128; a wider one changes neither routing nor experts,
    # and the prompt fits into it.
    "gpt-oss": Shape(
        "gpt-oss-20b", ("GptOssForCausalLM", "GptOssConfig"), "GptOssTopKRouter",
        linear_logits, "eager",
        {
            "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880,
            "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8,
            "head_dim": 64, "sliding_window": 1024, "tie_word_embeddings": False,
            "num_local_experts": 32, "num_experts_per_tok": 4,
        },
        TINY | {"num_hidden_layers": 4, "num_local_experts": 16},
    ),
}  # fmt: skip
BATCHES = (1, 16, 64)
REPEATS = {"graph decode": 5, "prefill": 3}
STOCK_EXPERTS = {1: "batched_mm"}
"""The faster implementation of the experts for decoding; ``grouped_mm`` for other batches.

``batched_mm`` copies the weights of every pair of token and expert.
"""
PIECES = 6
"""Layers whose routers and experts are timed alone: more weights than the cache holds."""
LARGEST_DIFFERENCE = 0.01
"""Of a layer's experts in bfloat16 from ``grouped_mm``, by norm: what one rounding more moves."""
LARGEST_GAP = 0.03
"""Of logits that stock's roundings to bfloat16, each at most 0.4 %, may put in another order."""


class Bench:
    """The model, its routers and experts, and the ways to compute them."""

    def __init__(self, model: str, *, tiny: bool) -> None:
        """Build the model."""
        import transformers

        self.shape, self.device = SHAPES[model], "cpu" if tiny else "cuda"
        self.prompt, self.steps = (16, 3) if tiny else (256, 20)
        model_class, config_class = (getattr(transformers, name) for name in self.shape.classes)
        self.config = config_class(**{**self.shape.real, **(self.shape.tiny if tiny else {})})
        torch.manual_seed(0)
        with torch.device(self.device):
            self.model: nn.Module = model_class._from_config(  # noqa: SLF001 -- AutoModel has no class for a text configuration
                self.config, dtype=torch.bfloat16, attn_implementation=self.shape.attention,
                experts_implementation="grouped_mm",
            )  # fmt: skip
        self.model.eval().requires_grad_(requires_grad=False)
        modules = list(self.model.modules())
        self.routers = [m for m in modules if type(m).__name__ == self.shape.router]
        self.experts = [m for m in modules if hasattr(m, "is_transposed")]
        # Logits of about N(0, 1), so that routing is neither uniform nor always the same.
        for router in self.routers:
            if hasattr(router, "proj"):
                router.proj.weight.normal_()
                router.per_expert_scale.uniform_(0.5, 1.5)
            else:
                router.weight.normal_(0.0, router.weight.shape[1] ** -0.5)
        names = ("stock", "full sort", "routing", "block", "gate")
        self.names = tuple(name for name in names if not tiny or name != "full sort")

    @contextmanager
    def way(self, name: str, experts: str) -> Iterator[None]:
        """Compute in that way inside the block; ``experts`` is stock's implementation."""
        self.model.set_experts_implementation(experts)
        if name in {"routing", "block", "gate"}:
            gate = name == "gate"
            with patched(self.model, experts=gate or name == "block", gate=gate) as report:
                selected = all(layer.selected for layer in report.experts)
                if report.left or not selected or any(layer.reason for layer in report.gates):
                    raise RuntimeError(str(report))
                yield
            return
        sorting = self.routers if name == "full sort" else []
        for router in sorting:
            router.forward = MethodType(self.full_sort_forward, router)
        try:
            yield
        finally:
            for router in sorting:
                del router.forward

    def full_sort_forward(self, router: Forward, hidden: Tensor) -> tuple[Tensor, ...]:
        """Route as the published kernel does, in one launch after the projection.

        Its ids are int64 and its weights of the dtype that stock returns.
        """
        from full_sort import full_sort

        logits = self.shape.logits(router, hidden.reshape(-1, hidden.shape[-1]))
        scale = getattr(router, "per_expert_scale", None)
        shape = (len(logits), self.topk)
        weights = logits.new_empty(shape, dtype=torch.float32)
        ids = logits.new_empty(shape, dtype=torch.int64)
        if scale is None:
            if not hasattr(router, "ones"):
                router.ones = logits.new_ones(logits.shape[1], dtype=torch.float32)
            full_sort(logits, self.topk, router.ones, (weights, ids))
            return logits, weights.to(logits.dtype), ids
        full_sort(logits, self.topk, scale, (weights, ids))
        return logits, weights, ids

    @property
    def topk(self) -> int:
        """K."""
        said = self.config.to_dict()
        found: int = said.get("top_k_experts", said.get("num_experts_per_tok"))
        return found


class Decoder:
    """Prefill, and one decode step over static tensors, at one batch size.

    A step has no host synchronisation.
    """

    def __init__(self, bench: Bench, batch: int) -> None:
        """Make the cache and the static tensors."""
        from transformers.cache_utils import StaticCache

        self.bench, self.model, device = bench, bench.model, bench.device
        length = -(-(bench.prompt + 2 * bench.steps + 8) // 8) * 8
        most = getattr(bench.config, "sliding_window", None)
        if most is not None and length > most:
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
        seen = (torch.arange(length, device=device) <= bench.prompt).view(1, 1, 1, -1)
        mask = seen
        if bench.shape.attention == "eager":  # which adds its mask
            mask = torch.zeros(seen.shape, dtype=torch.bfloat16, device=device)
            mask.masked_fill_(~seen, torch.finfo(torch.bfloat16).min)
        layers = getattr(bench.config, "layer_types", None) or ["full_attention"]
        kinds = {"full_attention", *layers}
        self.mask = mask if kinds == {"full_attention"} else dict.fromkeys(kinds, mask)

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
        """Decode the token after the prompt.

        The next one is computed and not fed back, so all steps are alike.
        """
        for layer in self.cache.layers:  # a Python count that picks a branch; it must not run on
            if hasattr(layer, "cumulative_length_int"):
                layer.cumulative_length_int = self.bench.prompt
        output = self.model(
            input_ids=self.token, position_ids=self.position, past_key_values=self.cache,
            use_cache=True, attention_mask=self.mask,
        )  # fmt: skip
        self.next.copy_(output.logits[:, -1].argmax(-1, keepdim=True))

    def captured(self) -> Callable[[], None]:
        """Capture a step in a CUDA graph and return its replay."""
        self.rewind()
        return captured(self.step)


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """Capture a call in a CUDA graph and return its replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
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


def alternate(
    names: tuple[str, ...], repeats: int, block: Callable[[str], float]
) -> dict[str, list[float]]:
    """Time a block of each way in turn, some times, each time beginning with another."""
    times: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        for name in (names[(index + repeat) % len(names)] for index in range(len(names))):
            times[name].append(round(block(name), 5))
    return times


def steps(bench: Bench, decoder: Decoder, stage: str, experts: str) -> dict[str, list[float]]:
    """Time a stage: decode steps in CUDA graphs that are captured anew for each block, or prefills.

    Where a capture lays its memory may cost time too. On a CPU nothing is captured.
    """

    def block(name: str) -> float:
        with bench.way(name, experts):
            if stage == "prefill":
                decoder.prefill()
                return milliseconds(bench.device, decoder.prefill, 1)
            if bench.device == "cpu":
                decoder.rewind()
                return milliseconds(bench.device, decoder.step, bench.steps)
            replay = decoder.captured()
        decoder.rewind()
        for _ in range(2):
            replay()
        return milliseconds(bench.device, replay, bench.steps)

    return alternate(bench.names, REPEATS[stage], block)


Calls = list[tuple[Any, tuple[Any, ...]]]


class Pieces:
    """What the routers and experts of some layers got in a step or prefill, and their times."""

    def __init__(self, bench: Bench, call: Callable[[], None]) -> None:
        """Record one call in stock's way."""
        self.bench, self.layers = bench, len(bench.routers)
        some = range(0, self.layers, max(1, self.layers // PIECES))
        self.calls: dict[str, Calls] = {"routers": [], "experts": []}
        hooks = [
            modules[index].register_forward_pre_hook(self._recorder(kind))
            for kind, modules in (("routers", bench.routers), ("experts", bench.experts))
            for index in some
        ]
        call()
        for hook in hooks:
            hook.remove()

    def _recorder(self, kind: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def record(module: nn.Module, given: tuple[Any, ...]) -> None:
            self.calls[kind].append((module, tuple(item.clone() for item in given)))

        return record

    def measured(self, experts: str) -> dict[str, dict[str, float]]:
        """Return the microseconds of a layer's router and experts in each way."""
        found: dict[str, dict[str, float]] = {}
        for name in self.bench.names:
            with self.bench.way(name, experts):
                found[name] = {
                    kind: self._microseconds(calls) for kind, calls in self.calls.items()
                }
        return found

    def kernels(self) -> dict[str, float]:
        """Return the microseconds of plan, permute and combine in a layer."""
        given = [(experts, *operands) for experts, operands in self.calls["experts"]]
        plans = [plan(ids, experts.num_experts) for experts, _, ids, _ in given]
        rows = [permute(each[1], made) for each, made in zip(given, plans, strict=True)]
        several: dict[str, Calls] = {
            "plan": [(plan, (ids, experts.num_experts)) for experts, _, ids, _ in given],
            "permute": [(permute, (e[1], made)) for e, made in zip(given, plans, strict=True)],
            "combine": [
                (combine, (row, made, each[3]))
                for row, made, each in zip(rows, plans, given, strict=True)
            ],
        }
        return {name: self._microseconds(calls) for name, calls in several.items()}

    def _microseconds(self, calls: Calls) -> float:
        def call() -> None:
            for function, given in calls:
                function(*given)

        if self.bench.device == "cpu":
            call()
            return round(milliseconds("cpu", call, 1) * 1e3 / len(calls), 3)
        replay = captured(call)
        for _ in range(2):
            replay()
        return round(milliseconds("cuda", replay, 5) * 1e3 / len(calls), 3)


def judged(
    times: dict[str, list[float]], pieces: dict[str, dict[str, float]], layers: int, **about: object
) -> dict[str, Any]:
    """Sum up a stage: medians, spread, time saved, and what the pieces predict."""
    median = {name: statistics.median(values) for name, values in times.items()}
    alone = {name: sum(kinds.values()) * layers / 1e3 for name, kinds in pieces.items()}
    predicted = {name: round(median["stock"] + alone[name] - alone["stock"], 5) for name in median}
    row: dict[str, Any] = {
        **about,
        "ms": times,
        "median_ms": median,
        "spread_percent": {
            name: round(100 * (max(v) - min(v)) / median[name], 3) for name, v in times.items()
        },
        "predicted_ms": predicted,
        "less_than_stock_percent": less(median),
        "predicted_less_than_stock_percent": less({**predicted, "stock": median["stock"]}),
        "pieces_us_a_layer": pieces,
    }
    for name, value in median.items():
        print(
            f"{about} {name:9}: {value:.4f} ms ({row['less_than_stock_percent'][name]} % less, "
            f"predicted {row['predicted_less_than_stock_percent'][name]} %), spread "
            f"{row['spread_percent'][name]} %, alone {pieces[name]} us a layer",
            flush=True,
        )
    return row


def less(times: Mapping[str, float]) -> dict[str, float]:
    """Return how much less than stock each way takes, in percent."""
    return {name: round(100 * (1 - value / times["stock"]), 3) for name, value in times.items()}


def routing_agreement(bench: Bench, calls: Calls) -> dict[str, Any]:
    """Compare our routing with stock on the same input; rows that differ must be ties."""
    found = {"rows": 0, "ties": 0, "wrong": 0, "largest_weight_difference": 0.0}
    for router, (hidden, *_) in calls:
        _, weights, ids = router(hidden)
        with bench.way("routing", "grouped_mm"):
            _, our_weights, our_ids = router(hidden)
        logits = bench.shape.logits(router, hidden.reshape(-1, hidden.shape[-1])).float()
        same = (ids.sort(-1).values == our_ids.sort(-1).values).all(-1)
        tie = (
            logits.gather(1, ids).sort(-1).values == logits.gather(1, our_ids).sort(-1).values
        ).all(-1) & ~same
        dense, our_dense = (
            torch.zeros_like(logits).scatter(1, i, w.float())
            for i, w in ((ids, weights), (our_ids, our_weights))
        )
        found["rows"] += len(logits)
        found["ties"] += int(tie.sum())
        found["wrong"] += int((~same & ~tie).sum())
        difference = float((dense - our_dense)[same].abs().max()) if same.any() else 0.0
        found["largest_weight_difference"] = max(found["largest_weight_difference"], difference)
    print(f"routing on the same logits: {found}", flush=True)
    if found["wrong"]:
        raise RuntimeError(str(found))
    return found


def gate_agreement(bench: Bench, calls: Calls) -> dict[str, Any]:
    """Compare the experts that ``gate`` selects with stock's, from the same hidden states.

    Stock rounds its norm, its scaled hidden states and its logits. So rows may differ where stock's
    logits are near: ``largest_gap`` is how far apart, of its logits, an expert that stock alone
    selected and one that ``gate`` alone selected are, as a share of the larger magnitude.
    """
    found = {"rows": 0, "differ": 0, "largest_gap": 0.0}
    for router, (hidden, *_) in calls:
        _, _, ids = router(hidden)
        with bench.way("gate", "grouped_mm"):
            _, _, our_ids = router(hidden)
        logits = bench.shape.logits(router, hidden.reshape(-1, hidden.shape[-1])).float()
        theirs, ours = (
            torch.zeros_like(logits).scatter(1, selected.long(), 1.0).bool()
            for selected in (ids, our_ids)
        )
        differ = (theirs != ours).any(-1)
        found["rows"] += len(logits)
        found["differ"] += int(differ.sum())
        if differ.any():
            best = logits.masked_fill(~theirs | ours, -torch.inf).amax(-1)[differ]
            least = logits.masked_fill(~ours | theirs, torch.inf).amin(-1)[differ]
            gap = (best - least) / torch.maximum(best.abs(), least.abs())
            found["largest_gap"] = max(found["largest_gap"], float(gap.max()))
    print(f"gate on the same hidden states: {found}", flush=True)
    if found["largest_gap"] > LARGEST_GAP:
        msg = f"expected gaps of at most {LARGEST_GAP}, got {found}"
        raise RuntimeError(msg)
    return found


def experts_agreement(bench: Bench, calls: Calls) -> dict[str, Any]:
    """Compare one layer's experts in our way with ``grouped_mm``, for few and many tokens."""
    experts, (hidden, ids, weights) = calls[0]
    found: dict[str, float] = {}
    for tokens in sorted({1, min(16, len(hidden)), len(hidden)}):
        given = (hidden[:tokens], ids[:tokens], weights[:tokens])
        with bench.way("stock", "grouped_mm"):
            its = experts(*given).float()
        with bench.way("block", "grouped_mm"):
            mine = experts(*given).float()
        found[str(tokens)] = float((mine - its).norm() / its.norm())
    print(f"experts, differences from grouped_mm by norm: {found}", flush=True)
    if not max(found.values()) <= LARGEST_DIFFERENCE:
        msg = f"expected differences of at most {LARGEST_DIFFERENCE}, got {found}"
        raise RuntimeError(msg)
    return found


def run(out: Path, model: str, batches: tuple[int, ...], *, tiny: bool) -> None:
    """Measure one model; the file is written after each stage."""
    import transformers

    begin = time.perf_counter()
    bench = Bench(model, tiny=tiny)
    result: dict[str, Any] = {
        "what": f"end to end: {bench.shape.what}'s shape, random bf16 weights"
        + (", TINY: a trial of the script" if tiny else ""),
        "model": model,
        "date": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "device": "cpu" if tiny else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "parameters": sum(parameter.numel() for parameter in bench.model.parameters()),
        "layers": len(bench.routers),
        "prompt": bench.prompt,
        "rows": [],
    }
    if not tiny:
        import triton

        result["triton"] = triton.__version__
    print(f"built in {time.perf_counter() - begin:.1f} s: {result}", flush=True)

    def keep(stage: str, batch: int, decoder: Decoder, call: Callable[[], None]) -> None:
        experts = STOCK_EXPERTS.get(batch, "grouped_mm") if stage != "prefill" else "grouped_mm"
        with bench.way("stock", experts):
            pieces = Pieces(bench, call)
        about = {"stage": stage, "batch": batch, "experts": experts}
        times, alone = steps(bench, decoder, stage, experts), pieces.measured(experts)
        row = judged(times, alone, len(bench.routers), **about)
        row["kernels_us_a_layer"] = pieces.kernels()
        ids = [given[1] for _, given in pieces.calls["experts"]]
        row["experts_used_a_layer"] = statistics.mean(len(each.unique()) for each in ids)
        result["rows"].append(row)
        result["seconds"] = round(time.perf_counter() - begin, 1)
        out.write_text(json.dumps(result, indent=1) + "\n")

    with torch.no_grad():
        first = Decoder(bench, batches[0])
        with bench.way("stock", "grouped_mm"):
            calls = Pieces(bench, first.prefill).calls
        result["routing_agreement"] = routing_agreement(bench, calls["routers"])
        result["gate_agreement"] = gate_agreement(bench, calls["routers"])
        result["experts_agreement"] = experts_agreement(bench, calls["experts"])
        del first, calls
        for batch in batches:
            decoder = Decoder(bench, batch)
            keep("prefill", batch, decoder, decoder.prefill)
            with bench.way("stock", "grouped_mm"):
                decoder.prefill()  # every decode step begins with what stock's prefill left
            decoder.rewind()
            keep("graph decode", batch, decoder, decoder.step)
    print(f"done in {result['seconds']} s", flush=True)


def plot(source: Path, out: Path) -> None:
    """Draw how much less than stock each way takes in a decode step, and what was predicted."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    measured = json.loads(source.read_text())
    rows = [row for row in measured["rows"] if row["stage"] == "graph decode"]
    names = [name for name in rows[0]["median_ms"] if name != "stock"]
    colours = {"full sort": "#f4a261", "routing": "#2a9d8f", "block": "#264653", "gate": "#8ab17d"}
    figure, axes = plt.subplots(figsize=(6, 3.8), layout="constrained")
    for offset, name in enumerate(names):
        places = [index + 0.2 * (offset - (len(names) - 1) / 2) for index in range(len(rows))]
        bars = axes.bar(
            places, [row["less_than_stock_percent"][name] for row in rows], 0.19,
            color=colours[name], label=name,
        )  # fmt: skip
        axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
        expected = [row["predicted_less_than_stock_percent"][name] for row in rows]
        label = "predicted" if offset == len(names) - 1 else None
        axes.plot(places, expected, "D", color="#e76f51", markersize=4, label=label)
    axes.set_xticks(range(len(rows)), [f"batch {row['batch']}" for row in rows])
    axes.set_title("Decode step: less time than transformers' own, %", fontsize=10)
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    what = f"{SHAPES[measured['model']].what}'s shape, CUDA-graph decode, {measured['device']}"
    figure.suptitle(what, fontsize=11)
    figure.savefig(out, dpi=150)


def sizes(text: str) -> tuple[int, ...]:
    """Read ``1,16,64``."""
    return tuple(int(part) for part in text.split(","))


def main() -> None:
    """Run or plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="measure")
    running.add_argument("out", type=Path, metavar="OUT.json")
    running.add_argument("--model", choices=SHAPES, default="gemma4")
    running.add_argument("--batches", type=sizes, metavar="1,16,64", help="sequences at a time")
    running.add_argument(
        "--tiny", action="store_true", help="a small model on the CPU, to try the script"
    )
    drawing = commands.add_parser("plot", help="draw what was measured")
    drawing.add_argument("source", type=Path, metavar="IN.json")
    drawing.add_argument("out", type=Path, metavar="OUT.png")
    said = parser.parse_args()
    if said.command == "run":
        batches = said.batches or ((1, 2) if said.tiny else BATCHES)
        run(said.out, said.model, batches, tiny=said.tiny)
    else:
        plot(said.source, said.out)


if __name__ == "__main__":
    main()
