"""Run the Triton kernels in Triton's interpreter, on the CPU, against the oracle.

The script prints what was found as JSON.

A process of its own, because ``TRITON_INTERPRET=1`` must be set before the kernels are imported.
``2/10`` runs every tenth case, from the second on; any other text runs the cases whose title begins
with it. ``--cuda`` runs them on the GPU at hand; in many processes at a time, for Triton compiles
them all.
"""

import json
import os
import sys
from functools import partial
from itertools import islice, product
from random import Random

from interpreter import interpret

ON_GPU = "--cuda" in sys.argv
if ON_GPU:
    os.environ["TRITON_INTERPRET"] = "0"
else:
    interpret()

import torch  # noqa: E402 -- after the variable is set
import triton  # noqa: E402 -- likewise
import triton.language as tl  # noqa: E402 -- likewise

from moe_routing import RoutingOutput  # noqa: E402 -- likewise
from moe_routing.probing import probe  # noqa: E402 -- likewise
from moe_routing.reference.compare import compare  # noqa: E402 -- likewise
from moe_routing_backends.triton.device.bf16x2 import low_f16  # noqa: E402 -- likewise
from moe_routing_backends.triton.device.keys import value_of_truncated  # noqa: E402 -- likewise
from moe_routing_backends.triton.kernels import VARIANTS, supports  # noqa: E402 -- likewise
from moe_routing_backends.triton.kernels.filter import approximate_scores, range_of  # noqa: E402 -- likewise
from moe_routing_backends.triton.kernels.spec import Launch, kernel_spec  # noqa: E402 -- likewise
from moe_routing_backends.triton.runtime.router import build  # noqa: E402 -- likewise
from moe_routing_registry import DeviceInfo, RoutingProblem, RoutingSpec  # noqa: E402 -- likewise

DEVICE = probe("cuda:0") if ON_GPU else DeviceInfo(type="cpu", platform="cpu")
torch.set_default_device(DEVICE.type)
SPECS = {
    "gemma4": RoutingSpec(family="f", renormalize=True, per_expert_scale=True),
    "softmax": RoutingSpec(family="f"),
    "softmax_bias": RoutingSpec(
        family="f", selection="scores_plus_bias", renormalize=True, renorm_floor=1e-12
    ),
    "zero_experts": RoutingSpec(
        family="f", selection="scores_plus_bias", scale=6.0, zero_experts=3
    ),
    "sigmoid": RoutingSpec(family="f", score="sigmoid"),
    "sigmoid_renorm": RoutingSpec(family="f", score="sigmoid", renormalize=True),
    "deepseek_v3": RoutingSpec(
        family="f", score="sigmoid", selection="scores_plus_bias", renormalize=True,
        renorm_epsilon=1e-20, scale=2.5, num_groups=8, topk_groups=4, group_sum=2,
    ),
    "sigmoid_bias": RoutingSpec(
        family="f", score="sigmoid", selection="scores_plus_bias", renormalize=True,
        scale=2.0, shared_experts=1,
    ),
    "one_group": RoutingSpec(  # where groups are twins, one is kept and the other not
        family="f", score="sigmoid", selection="scores_plus_bias",
        num_groups=8, topk_groups=1, group_sum=2,
    ),
    "deepseek_v2": RoutingSpec(family="f", num_groups=8, topk_groups=3, scale=16.0),
    "sqrtsoftplus": RoutingSpec(
        family="f", score="sqrtsoftplus", selection="scores_plus_bias", renormalize=True, scale=1.5
    ),
    "token_table": RoutingSpec(
        family="f", score="sqrtsoftplus", selection="token_table", renormalize=True, scale=1.5
    ),
    "sparsemixer": RoutingSpec(family="f", selection="sparsemixer"),
    "top2_of_logits": RoutingSpec(
        family="f", num_groups=4, topk_groups=2, group_sum=2, renormalize=True
    ),
    "topk_per_group": RoutingSpec(family="f", num_groups=4, topk_per_group=True, renormalize=True),
    "logit_bias": RoutingSpec(family="f", score="sigmoid", selection="logits_plus_bias"),
    "soft_cap": RoutingSpec(family="f", renormalize=True, logit_softcap=30.0, logit_multiplier=0.7),
    "shared": RoutingSpec(
        family="f", score="sigmoid", renormalize=True, shared_experts=2, scale=2.5,
        per_expert_scale=True,
    ),
}  # fmt: skip
SIEVED = ("gemma4", "softmax", "sigmoid_renorm", "sigmoid_bias", "soft_cap", "shared")
ROWS = ("gemma4", "softmax", "softmax_bias", "sigmoid_renorm", "logit_bias", "soft_cap", "shared")

TILED = (
    ("deepseek_v3", 192, 8, 8), ("one_group", 128, 8, 8), ("deepseek_v2", 128, 6, 16),
    ("top2_of_logits", 64, 4, 4), ("softmax_bias", 64, 6, 2), ("sqrtsoftplus", 64, 8, 8),
    ("logit_bias", 40, 4, 4), ("zero_experts", 64, 12, 4), ("soft_cap", 32, 1, 2),
)  # fmt: skip
"""Specs in the block kernel, with E, K and threads a row.

Groups padded and whole, one and more threads a group, both lists.
"""


def hostile(tokens, experts, generator):
    """NaN, both infinities, both zeros, and ties, in rows with and without anything finite."""
    x = (torch.randn(tokens, experts, generator=generator) * 8).round() / 4
    kind = torch.rand(tokens, experts, generator=generator)
    for i, value in enumerate((torch.nan, torch.inf, -torch.inf, -0.0, 0.0)):
        x[(kind > i / 10) & (kind < (i + 1) / 10)] = value
    x[0], x[1], x[2] = torch.nan, -torch.inf, torch.inf
    return x


def close(tokens, experts, generator):
    """Values that differ in their lowest bits only.

    32-bit keys with a place inside cannot tell them apart.
    """
    x = 1 + torch.randint(0, 40, (tokens, experts), generator=generator) * 2.0**-23
    x[:, ::3] *= -1
    return x


def twins(tokens, experts, generator):
    """What routers see, but the second half repeats the first up to the lowest bits."""
    x = torch.randn(tokens, experts, generator=generator)
    half = experts // 2
    x[:, -half:] = x[:, :half] * (
        1 + torch.randint(-2, 3, (tokens, half), generator=generator) * 2.0**-22
    )
    return x


def far(tokens, experts, generator):
    """The rows of ``twins`` below a best that is 8, 64, 512, ... times as high.

    32-bit keys cannot hold both that and the lowest bits.
    """
    x = twins(tokens, experts, generator)
    x[:, experts // 3] = 2.0 ** (3.4 + 3 * torch.arange(tokens))
    return x


def silent(tokens, experts, generator):
    """What routers see, but two experts are NaN in every row.

    The two have the highest biases (``biases``).
    """
    x = torch.randn(tokens, experts, generator=generator)
    x[:, 3] = x[:, -2] = torch.nan
    return x


def masked(tokens, experts, generator):
    """What routers see, of experts of which some have biases far below all others (``biases``)."""
    return torch.randn(tokens, experts, generator=generator)


def tiny(tokens, experts, generator):
    """Float32 below its normal numbers; zeros as float16."""
    return torch.randn(tokens, experts, generator=generator) * 2.0**-140


def normal(tokens, experts, generator):
    """Draw what routers see, with a few that are not finite."""
    x = torch.randn(tokens, experts, generator=generator) * 4
    x[torch.rand(tokens, experts, generator=generator) < 0.02] = torch.inf
    x[torch.rand(tokens, experts, generator=generator) < 0.02] = torch.nan
    return x


def biases(experts, kind, generator):
    """Small ones as in trained models.

    Scores of some kinds get others: infinite ones, equal halves, or values far apart.
    """
    bias = torch.randn(experts, generator=generator) * 0.1
    if kind == "hostile":
        few = torch.rand(experts, generator=generator) < 0.1
        return torch.where(few, bias * 1e6, hostile(4, experts, generator)[3])
    if kind == "masked":
        bias[5::16], bias[11::16] = -1e4, -1e9
    if kind == "silent":
        bias[3], bias[-2] = 14.0, 500.0
    if kind == "twins":
        bias[-(experts // 2) :] = bias[: experts // 2]
    return bias * 500 if kind == "far" else bias


KINDS = {
    "hostile": hostile,
    "close": close,
    "twins": twins,
    "far": far,
    "silent": silent,
    "masked": masked,
    "tiny": tiny,
    "normal": normal,
}
DRAWN = 24
"""Random cases, the same in every run: they are for the next change of a kernel."""


def draw(random, variant):
    """Draw a case that the contract allows and the variant can serve."""
    while True:
        name, experts, k = (
            random.choice(list(SPECS)),
            random.choice(range(8, 200, 8)),
            random.randint(1, 16),
        )
        launch = Launch(variant, 4, random.choice([1, 2, 4, 8]), 1)
        dtype = random.choice([torch.float32, torch.bfloat16, torch.float16])
        spec = SPECS[name]
        try:
            spec.check_size(experts, k)
        except ValueError:
            continue
        if supports(
            RoutingProblem(spec=spec, num_experts=experts, topk=k, dtype=str(dtype)[6:]), launch
        ):
            return name, launch, experts, k, dtype, random.choice(list(KINDS))


def run(  # noqa: PLR0913, PLR0917 -- what a case is
    name, launch, experts, k, dtype, kind, *, extras=False
):
    """Route once; return what is wrong, and the outputs."""
    spec = SPECS[name]
    generator = torch.Generator(DEVICE.type).manual_seed(7)
    tokens, slots = 6, experts + spec.shared_experts
    storage = torch.empty(tokens, experts + 8, dtype=dtype)
    logits = storage[:, :experts]
    logits.copy_(KINDS[kind](tokens, experts, generator))
    operands = {}
    if spec.per_expert_scale:
        operands["per_expert_scale"] = torch.rand(experts, generator=generator) + 0.5
    if spec.needs_bias:
        operands["bias"] = biases(experts, kind, generator)
    if spec.selection == "token_table":
        operands["token_ids"] = torch.randint(0, 9, (tokens,), generator=generator)
        operands["expert_table"] = torch.stack(
            [torch.randperm(experts, generator=generator)[:k] for _ in range(9)]
        )
        # No token of the table, and entries that name no expert, not even where an int32 holds what
        # is left of them.
        operands["token_ids"][:2] = torch.tensor(
            [9, -1] if kind == "hostile" else [-(2**40), 2**32]
        )
        operands["expert_table"][::4, -1] = torch.tensor([experts, -1, 2**32 + 1])
    if extras:
        operands["expert_map"] = torch.randperm(slots, generator=generator)
        operands["num_valid_tokens"] = torch.tensor([4])
    ids_dtype = "int64" if extras else "int32"
    problem = RoutingProblem(
        spec=spec, num_experts=experts, topk=k, dtype=str(dtype)[6:], ids_dtype=ids_dtype
    )
    router = build(problem, DEVICE)
    router._limits, router._launches = [], [launch]
    columns = k + spec.shared_experts
    out = RoutingOutput(
        torch.full((tokens, columns), torch.nan),
        torch.full((tokens, columns), -7, dtype=getattr(torch, ids_dtype)),
    )
    given = dict(operands)
    if extras and spec.selection == "token_table":
        given["token_ids"] = torch.cat(
            [operands["token_ids"][:4], torch.full((tokens - 4,), 2**40)]
        )  # padding has no token
    router(logits, **given, out=out)
    return compare(spec, logits, k, out, **operands).problems, out


def compared_with_cooperative(name, launch, *rest, one_row=False):
    """Route once in this launch and once in the cooperative kernel.

    Return what is wrong, other bits too.
    """
    problems, out = run(name, launch, *rest)
    _, other = run(name, Launch("cooperative", 1 if one_row else 2, 1, 1), *rest)
    same = torch.equal(out.weights, other.weights) and torch.equal(out.ids, other.ids)
    return problems + ([] if same else ["bits differ from the cooperative kernel's"])


SIGMOID_BIAS = RoutingSpec(family="sigmoid_bias", score="sigmoid", selection="scores_plus_bias")
SIGMOID_BIAS_SPEC = kernel_spec(
    RoutingProblem(spec=SIGMOID_BIAS, num_experts=128, topk=8, dtype="float32")
)


@triton.jit
def approximate_kernel(logits, bias, found, COUNT: tl.constexpr, SPEC: tl.constexpr):
    """Approximate scores as the filter does.

    Take each for the K-th and the highest of a row, for its threshold and bounds.
    """
    place = tl.program_id(0) * 4096 + tl.arange(0, 4096)
    b = tl.load(bias + place)
    x = tl.load(logits + place)
    pair = approximate_scores(x, x, b, b)
    least, most, threshold = range_of(pair, pair, SPEC)
    tl.store(found + place, low_f16(pair))
    tl.store(found + COUNT + place, low_f16(threshold >> 16))
    tl.store(found + 2 * COUNT + place, value_of_truncated(least))
    tl.store(found + 3 * COUNT + place, value_of_truncated(most))


def approximate_scores_are_within_bounds():
    """Hold the filter's approximate scores to the bounds in ``bf16x2.margin``, for all magnitudes.

    Say what is wrong.
    """
    sizes = torch.cat([torch.linspace(0, 20, 1024), 2.0 ** torch.linspace(-30, 31, 1024)])
    biases = torch.tensor([0.0, 0.1, -0.1, -0.5, -1.0, 0.9, 8.3, -8.3, 300.0, -300.0, -1000.0, 6e4])
    x, b = (
        t.flatten().contiguous()
        for t in torch.meshgrid(torch.cat([sizes, -sizes]), biases, indexing="ij")
    )
    found = torch.empty(4, len(x))
    approximate_kernel[len(x) // 4096,](x, b, found, len(x), SIGMOID_BIAS_SPEC)
    scores, thresholds, least, most = found.double()
    bound, exact = 0.00062 + scores.abs() / 1024, x.double().sigmoid()
    known = scores.isfinite()  # what is NaN or inf is never below a threshold
    wrong = {
        "no score where there should be one": ~known
        & (b.abs() <= 1024)
        & (exact + b.double() < 65000),
        "the score is off": known & ((scores - exact - b.double()).abs() > bound),
        "the threshold is high": known & (thresholds > scores - 2 * bound),
        "the least is high": known & (least > scores - bound),
        "the most is low": known & (most < scores + bound),
    }
    return [
        f"sigmoid({x[bad][0]}) + {b[bad][0]} = {scores[bad][0]}: {what}"
        for what, bad in wrong.items()
        if bad.any()
    ]


def cases():
    """Yield titles and what to call.

    All specs in the cooperative kernel, those that many tokens meet in the others, drawn ones.
    """
    yield "approximate scores", approximate_scores_are_within_bounds
    for name in SPECS:
        for dtype, kind, launch in (
            (torch.float32, "hostile", Launch("cooperative", 1, 1, 1)),
            (torch.bfloat16, "hostile", Launch("cooperative", 4, 1, 1)),
            (torch.float32, "close", Launch("cooperative", 4, 1, 1)),
        ):
            alone = partial(run, name, launch, 24, 4, dtype, kind, extras=launch.block_t > 1)
            yield f"cooperative {name} {dtype} {kind}", lambda alone=alone: alone()[0]
    for name in ROWS:
        for dtype, kind, threads, experts, k in (
            (torch.float32, "close", 1, 40, 4),
            (torch.float16, "hostile", 2, 40, 6),
            (torch.float32, "hostile", 4, 64, 9),
        ):
            launch = Launch("thread_per_row", 4, threads, 1)
            yield (
                f"thread_per_row {name} {dtype} {kind}",
                partial(compared_with_cooperative, name, launch, experts, k, dtype, kind),
            )
    for place, name in enumerate(SIEVED):
        spec = SPECS[name]
        plain = not spec.needs_bias and spec.logit_softcap is None
        every_other = (
            slice(place % 2, None, 2) if plain else slice(None)
        )  # two specs that select by logits share the rows
        for dtype, kind, threads, experts, k in (
            (torch.float32, "close", 2, 48, 4),
            (torch.float32, "twins", 2, 64, 5),
            (torch.float32, "far", 4, 96, 9),
            (torch.float32, "masked", 4, 128, 6),
            (torch.bfloat16, "hostile", 1, 72, 6),
            (torch.bfloat16, "silent", 2, 128, 6),
            (torch.bfloat16, "hostile", 2, 128, 6),
            (torch.float16, "hostile", 4, 64, 9),
        )[every_other]:
            launch = Launch("filter", 4, threads, 1)
            yield (
                f"filter {name} {dtype} {kind} {experts}",
                partial(compared_with_cooperative, name, launch, experts, k, dtype, kind),
            )
    for name, experts, k, threads in TILED:
        launch = Launch("block", 4, threads, 1)
        for kind, dtype in (
            *product(("close", "far", "twins", "masked"), [torch.float32]),
            ("hostile", torch.bfloat16),
        ):
            yield (
                f"block {name} {dtype} {kind}",
                partial(compared_with_cooperative, name, launch, experts, k, dtype, kind),
            )
    random = Random(0)  # noqa: S311 -- cases of a test
    for variant in list(VARIANTS) * (DRAWN // len(VARIANTS)):
        name, launch, *rest = draw(random, variant)
        yield (
            " ".join(["drawn", name, *map(str, (launch, *rest))]),
            partial(compared_with_cooperative, name, launch, *rest, one_row=True),
        )


def main():
    """Run all cases, or a share of them."""
    torch.set_num_threads(1)
    wanted = sys.argv[-1]
    if "/" in wanted:
        part, parts = map(int, wanted.split("/"))
        chosen = islice(cases(), part - 1, None, parts)
    else:
        chosen = ((title, case) for title, case in cases() if title.startswith(wanted))
    json.dump({title: case() for title, case in chosen}, sys.stdout)


if __name__ == "__main__":
    main()
