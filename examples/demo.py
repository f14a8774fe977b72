"""Route a real mixture-of-experts model of transformers twice: by its own code and by moe-routing.

``make demo``, or ``python examples/demo.py --model gemma4|deepseek_v3|qwen3_moe|gpt_oss``. The
model has its real class and random weights: nothing is downloaded. Every layer's router logits are
captured while the model runs, routed with ``moe_routing.get_router(...)``, and compared with what
the model's own router returned. Exit code 0: they agree, 1: they do not, 2: something is missing.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.utils.benchmark import Timer

import moe_routing

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

EXPERTS, TOPK, HIDDEN, VOCABULARY = 16, 4, 128, 512
TOLERANCE = 1e-5
"""Largest difference of two weights that float32 rounding explains.

Both sides compute in float32 from the same logits.
"""
BARS = 40
console = Console(width=min(Console().width, 80), highlight=False)


@dataclass(frozen=True)
class Recipe:
    """A small model: its classes in transformers, its settings, and where its router keeps things.

    :ivar logits: computes the router's logits from its input, as the router itself does.
    :ivar operands: the further operands of the maths, by the names that ``Router.__call__`` gives
        them.
    """

    model: str
    config: str
    router: str
    settings: Mapping[str, Any]
    logits: Callable[[Any, Tensor], Tensor]
    operands: Callable[[Any], dict[str, Any]] = field(default=lambda _router: {})


SIZES: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
RECIPES = {
    "gemma4": Recipe(
        model="Gemma4ForCausalLM",
        config="Gemma4TextConfig",
        router="Gemma4TextRouter",
        settings={
            "enable_moe_block": True,
            "num_experts": EXPERTS,
            "top_k_experts": TOPK,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 0,
            "num_global_key_value_heads": 1,
            "global_head_dim": 64,
            "num_kv_shared_layers": 0,
        },
        logits=lambda router, hidden: router.proj(
            router.norm(hidden) * router.scale * router.scalar_root_size
        ),
        operands=lambda router: {"per_expert_scale": router.per_expert_scale},
    ),
    "deepseek_v3": Recipe(
        model="DeepseekV3ForCausalLM",
        config="DeepseekV3Config",
        router="DeepseekV3TopkRouter",
        settings={
            "n_routed_experts": EXPERTS,
            "num_experts_per_tok": TOPK,
            "first_k_dense_replace": 0,
            "num_key_value_heads": 4,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 32,
            "v_head_dim": 32,
        },
        logits=lambda router, hidden: nn.functional.linear(
            hidden.view(-1, HIDDEN).float(), router.weight.float()
        ),
        operands=lambda router: {"bias": router.e_score_correction_bias},
    ),
    "qwen3_moe": Recipe(
        model="Qwen3MoeForCausalLM",
        config="Qwen3MoeConfig",
        router="Qwen3MoeTopKRouter",
        settings={"num_experts": EXPERTS, "num_experts_per_tok": TOPK},
        logits=lambda router, hidden: nn.functional.linear(hidden, router.weight),
    ),
    "gpt_oss": Recipe(
        model="GptOssForCausalLM",
        config="GptOssConfig",
        router="GptOssTopKRouter",
        settings={"num_local_experts": EXPERTS, "num_experts_per_tok": TOPK},
        logits=lambda router, hidden: nn.functional.linear(hidden, router.weight, router.bias),
    ),
}


class Call(NamedTuple):
    """One call of a layer's router while the model ran: its input, and what it returned."""

    router: nn.Module
    hidden: Tensor
    weights: Tensor
    ids: Tensor


class Layer(NamedTuple):
    """What came out for a layer.

    Tokens with equal ids, the largest weight difference, both times, the experts' load.
    """

    same_ids: int
    difference: float
    theirs_us: float
    ours_us: float
    load: Tensor


def build(recipe: Recipe, device: str) -> nn.Module:
    """Build the model with random weights.

    The logits, biases and scales of its routers tell experts apart.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = getattr(transformers, recipe.config)(**{**SIZES, **recipe.settings})
    model: nn.Module = (
        getattr(transformers, recipe.model)(config)
        .to(device)
        .eval()
        .requires_grad_(requires_grad=False)
    )
    for router in routers(model, recipe):
        for name, tensor in [*router.named_parameters(), *router.named_buffers()]:
            if name.endswith("per_expert_scale"):
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                tensor.uniform_(-0.2, 0.2)
            elif name.endswith("proj.weight"):
                tensor.normal_()
            elif name == "weight":
                tensor.normal_(0.0, HIDDEN**-0.5)
    return model


def routers(model: nn.Module, recipe: Recipe) -> list[nn.Module]:
    """Return the routers of all layers, in order."""
    return [module for module in model.modules() if type(module).__name__ == recipe.router]


def run(model: nn.Module, recipe: Recipe, tokens: Tensor) -> list[Call]:
    """Run the model, and note every call of a router."""
    calls: list[Call] = []
    hooks = [
        router.register_forward_hook(
            lambda router, args, output: calls.append(Call(router, args[0], *output[1:3]))
        )
        for router in routers(model, recipe)
    ]
    model(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    return calls


def compare(recipe: Recipe, route: moe_routing.Router, call: Call) -> Layer:
    """Route the same logits again, compare, and time both from the router's input on."""
    operands = recipe.operands(call.router)

    def ours() -> moe_routing.RoutingOutput:
        return route(recipe.logits(call.router, call.hidden), TOPK, **operands)

    weights, ids = ours()
    theirs_by_expert, ours_by_expert = (
        torch.zeros(len(i), EXPERTS, device=w.device).scatter(1, i.long(), w.float())
        for w, i in ((call.weights, call.ids), (weights, ids))
    )
    same = (call.ids.long().sort(-1).values == ids.long().sort(-1).values).all(-1)
    return Layer(
        same_ids=int(same.sum()),
        difference=float((theirs_by_expert - ours_by_expert).abs().max()),
        theirs_us=microseconds(lambda: call.router(call.hidden)),
        ours_us=microseconds(ours),
        load=torch.bincount(ids.flatten().long(), minlength=EXPERTS).cpu(),
    )


def microseconds(call: Callable[[], object]) -> float:
    """Return the best time of a call on one thread, on a device too."""
    timer = Timer("call()", globals={"call": call}, num_threads=1)
    return min(timer.blocked_autorange(min_run_time=0.05).times) * 1e6


def headline(text: str) -> None:
    """Begin a section."""
    console.print()
    console.rule(text, align="left")


def show_model(
    name: str, recipe: Recipe, model: nn.Module, tokens: Tensor, route: moe_routing.Router
) -> None:
    """Say what is compared."""
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    headline(f"[bold]moe-routing · {name}")
    facts = Table.grid(padding=(0, 2))
    facts.add_row(
        "model", f"transformers' {recipe.model}, random weights, {parameters:.1f} M parameters"
    )
    facts.add_row("experts", f"E = {EXPERTS}, K = {TOPK}, {len(routers(model, recipe))} layers")
    facts.add_row("tokens", f"{tokens.shape[0]} sequences of {tokens.shape[1]}, on {tokens.device}")
    facts.add_row("router", f'route = moe_routing.get_router("{name}")')
    facts.add_row("formula", escape(route.spec.formula.replace("; ", "\n")))
    console.print(facts)


def show_agreement(layers: list[Layer], num_tokens: int) -> bool:
    """Print the layers' table; return whether all of them agree."""
    headline("[bold]The model's own router and moe-routing, on the same logits")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in (
        "layer",
        "tokens with\nequal ids",
        "largest weight\ndifference",
        "its own\ntime",
        "moe-routing's\ntime",
    ):
        table.add_column(heading, justify="right")
    table.add_column("")
    agree = [layer.same_ids == num_tokens and layer.difference <= TOLERANCE for layer in layers]
    for index, (layer, ok) in enumerate(zip(layers, agree, strict=True)):
        table.add_row(
            str(index),
            f"{layer.same_ids} / {num_tokens}",
            f"{layer.difference:.1e}",
            f"{layer.theirs_us:.0f} µs",
            f"{layer.ours_us:.0f} µs",
            "[green]agree" if ok else "[bold red]DIFFER",
        )
    table.add_section()
    total = [
        f"{sum(getattr(layer, side) for layer in layers):.0f} µs"
        for side in ("theirs_us", "ours_us")
    ]
    table.add_row("all", "", f"{max(layer.difference for layer in layers):.1e}", *total, "")
    console.print(table)
    console.print("[dim]Times: from the router's input to weights and ids, projection included.")
    return all(agree)


def show_backend(route: moe_routing.Router) -> None:
    """Say which backend routed, and why not another."""
    report = route.report
    if report is None:
        return
    headline("[bold]The backend")
    console.print(f"[bold green]{route.backend}[/]: {escape(report.why)}")
    for candidate in report.eligible:
        if candidate.name != report.winner:
            console.print(f"  also fits: {candidate.name} (priority {candidate.priority})")
    for rejection in report.considered:
        fix = f"; fix: [cyan]{escape(rejection.verdict.fix)}[/]" if rejection.verdict.fix else ""
        console.print(f"  not {rejection.name}: {escape(rejection.verdict.reason)}{fix}")


def show_load(layers: list[Layer]) -> None:
    """Draw how many tokens each expert got, over all layers."""
    load = torch.stack([layer.load for layer in layers]).sum(0)
    even = float(load.float().mean())
    headline(f"[bold]The experts' load[/], tokens over all layers (even: {even:.0f})")
    for expert, tokens in enumerate(load.tolist()):
        bar = "█" * round(BARS * tokens / int(load.max()))
        console.print(f"{expert:>4} [blue]{bar:<{BARS}}[/] {tokens:>5} {tokens / even:>5.2f}x")


def main() -> int:
    """Build, run, compare, show."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--model",
        choices=RECIPES,
        default="gemma4",
        help="which model to build (default: %(default)s)",
    )
    parser.add_argument("--device", default="cpu", help="where to run it (default: %(default)s)")
    parser.add_argument(
        "--backend", help="name of the backend to use (default: the best for the device)"
    )
    arguments = parser.parse_args()
    recipe = RECIPES[arguments.model]
    try:
        route = moe_routing.get_router(arguments.model, backend=arguments.backend)
    except ValueError as error:
        parser.error(str(error))
    try:
        model = build(recipe, arguments.device)
    except (ImportError, AttributeError) as error:
        console.print(
            f"[bold red]transformers with {recipe.model} is missing:[/] {escape(str(error))}"
        )
        console.print(
            "fix it in this checkout with:  [cyan]python -m pip install -e '.\\[transformers]'[/]"
        )
        return 2
    tokens = torch.randint(3, VOCABULARY, (4, 64), device=arguments.device)
    show_model(arguments.model, recipe, model, tokens, route)
    try:
        with torch.no_grad():
            layers = [compare(recipe, route, call) for call in run(model, recipe, tokens)]
    except moe_routing.BackendUnavailableError as error:
        console.print(f"[bold red]no backend:[/] {escape(str(error))}")
        return 2
    agree = show_agreement(layers, tokens.numel())
    show_backend(route)
    show_load(layers)
    verdict = "[bold green]every layer agrees" if agree else "[bold red]the two disagree"
    headline(verdict)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
